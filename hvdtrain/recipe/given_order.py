"""The order of an epoch as a recipe's `sampler` gives it: weights to draw by, or the ids themselves.

    ids        position p of the epoch has ids[p]
    weights    position p has the first id i with w_0 + ... + w_i > u_p * (w_0 + ... + w_(n-1))

The u_p are 53 bits each of Philox (Salmon et al., SC'11), keyed by seed and epoch, times 2^-53. Sums are added one
after the other in float64, so that they are the same on all ranks. What was given is kept, not what was drawn from it:
one file of weights serves all epochs, and `hvdtrain ledger verify` draws from it again.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvdtrain.recipe.order import MAX_EXAMPLES, Ids
from hvdtrain.system.errors import UserError

Kind = Literal["weights", "ids"]
DTYPES: dict[Kind, str] = {"weights": "<f8", "ids": "<i8"}
EXPECTED = "expected float weights, one for each example, or integer ids"


@dataclass(frozen=True)
class ListedOrder:
    """An epoch's order, listed: a `hvdtrain.recipe.order.Order`."""

    ids: Ids  # (examples,)

    @property
    def examples(self) -> int:
        """The number of positions."""
        return len(self.ids)

    def ids_between(self, begin: int, end: int) -> Ids:
        """Return the ids at positions [begin, end): (end - begin,) int64."""
        return self.ids[begin:end]


@dataclass(frozen=True)
class GivenOrder:
    """What a sampler has returned for an epoch."""

    kind: Kind
    values: NDArray[Any]  # (n,) float64 weights or int64 ids

    @cached_property
    def key(self) -> str:
        """The kind, and a digest of the values: `ids-5f2c...`."""
        digest = hashlib.sha256(self.values.astype(DTYPES[self.kind]).tobytes()).hexdigest()
        return f"{self.kind}-{digest[:32]}"

    def list_ids(self, seed: int, epoch: int) -> Ids:
        """Return the ids of an epoch (from 0) in their order, int64; as many as there are weights or ids."""
        if self.kind == "weights":
            return draw_by_weight(self.values, seed, epoch)
        return self.values


def draw_by_weight(weights: NDArray[np.float64], seed: int, epoch: int) -> Ids:
    """Draw as many ids as there are weights, with replacement: (n,) int64."""
    key = hashlib.sha256(f"hvdtrain draws 1: {len(weights)} examples, seed {seed}, epoch {epoch}".encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(key[:16], "<u8").astype(np.uint64)).random_raw(len(weights))
    uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    sums = np.cumsum(weights)
    last = int(np.flatnonzero(weights)[-1])  # a product may be rounded up to the whole sum
    ids: Ids = np.minimum(np.searchsorted(sums, uniform * sums[-1], side="right"), last).astype(np.int64)
    return ids


def read_given_order(returned: Any, call: str, count: int) -> GivenOrder:
    """Return what a sampler's result means.

    Args:
        returned: anything that numpy makes an array of, or an iterable of integers.
        call: how the sampler was called, for messages.
        count: the number of examples of the dataset.

    Raises:
        UserError: it is neither weights for all examples nor ids of examples.
    """
    try:
        values = np.asarray([*returned] if _is_iterator_only(returned) else returned)
    except (TypeError, ValueError) as error:
        raise UserError(f"{call} returned {type(returned).__name__}, {error}; {EXPECTED}") from error
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        shape = f"{values.dtype} of shape {values.shape}"
        raise UserError(f"{call} returned {type(returned).__name__} ({shape}); {EXPECTED}, in one dimension")
    if not len(values):
        raise UserError(f"{call} is empty; {EXPECTED}")
    if values.dtype.kind == "f":
        return GivenOrder("weights", _check_weights(values.astype(np.float64), call, count))
    return GivenOrder("ids", _check_ids(values, call, count))


def _is_iterator_only(returned: Any) -> bool:
    return isinstance(returned, Iterable) and not (hasattr(returned, "__getitem__") or hasattr(returned, "__array__"))


def _check_weights(weights: NDArray[np.float64], call: str, count: int) -> NDArray[np.float64]:
    if len(weights) != count:
        raise UserError(
            f"{call} returned {len(weights)} weights; expected {count}, one for each example (ids are integers: "
            "their dtype is an integer one)"
        )
    invalid = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(invalid):
        first = int(invalid[0])
        raise UserError(f"{call}[{first}] is {weights[first]:g}; expected a weight that is finite and not negative")
    total = float(np.cumsum(weights)[-1])
    if not 0 < total < np.inf:
        raise UserError(f"{call}: the weights add up to {total:g}; expected a positive, finite sum")
    return weights


def _check_ids(values: NDArray[Any], call: str, count: int) -> Ids:
    if len(values) > MAX_EXAMPLES:
        raise UserError(f"{call} returned {len(values)} ids; expected at most 2^62")
    outside = np.flatnonzero((values < 0) | (values >= count))
    if len(outside):
        first = int(outside[0])
        raise UserError(f"{call}[{first}] is {values[first]}; expected an id from 0 to {count - 1}")
    return values.astype(np.int64)


def encode_orders(orders: Mapping[int, GivenOrder]) -> bytes:
    """Return orders by some numbers, such as epochs, as bytes to send to other ranks."""
    file = io.BytesIO()
    arrays = {f"{number}.{order.kind}": order.values for number, order in orders.items()}
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def decode_orders(data: bytes) -> dict[int, GivenOrder]:
    """Return the orders that `encode_orders` was called with."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {int(name.partition(".")[0]): _build_order(name.partition(".")[2], arrays[name]) for name in arrays}


def encode_file(order: GivenOrder) -> bytes:
    """Return the content of the file that keeps an order, compressed."""
    values, file = order.values, io.BytesIO()
    if order.kind == "ids":
        values = values.astype(np.min_scalar_type(int(values.max())))
    arrays = {str(order.kind): values}
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def decode_file(data: bytes) -> GivenOrder:
    """Return the order that a file keeps. Raises ValueError if it is damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            (name,) = arrays
            return _build_order(name, arrays[name])
    except Exception as error:  # zipfile, zlib and numpy have many
        raise ValueError(f"is not a valid order: {error}") from error


def _build_order(kind: str, values: NDArray[Any]) -> GivenOrder:
    if kind not in DTYPES:
        raise ValueError(f"{kind!r} is neither weights nor ids")
    return GivenOrder(kind, values.astype(DTYPES[kind]))
