"""Gradients of JAX in loops of one's own: summed over ranks between two jitted functions.

    jitted gradients -> torch tensors of the same memory -> buckets: the only copy of torch's
                                                               | collectives, compressed or not
    fresh arrays    <- one jitted function cuts them out <- the buckets' flat tensors, imported whole

torch writes into its own buckets only. A bucket is written again by the next call, which begins when all that was cut
out of it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from hvdtrain.bridge.functions import Array
from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import check_agreement
from hvdtrain.compression.spec import parse_compression
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.buckets import Bucket, ExchangeConfig
from hvdtrain.exchange.parameter_checks import SUPPORTED_DTYPES
from hvdtrain.jax.leaves import Leaf, copy_to_numpy, export_array, flatten_tree, make_consistent_part
from hvdtrain.system.errors import UserError

CALL = "allreduce_gradients()"
SUPPORTED_NAMES = [str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES]


@dataclass(frozen=True)
class ReductionKey:
    """What an exchange is made for: calls that have all of it in common share one, and what compression has not sent.

    Attributes:
        leaves: the arrays of the tree.
        structure: of the tree.
        compression, average, seed, name: as given to `allreduce_gradients`.
        world: this process's rank and the number of ranks.
    """

    leaves: tuple[Leaf, ...]
    structure: Any
    compression: str
    average: bool
    seed: int
    name: str
    world: tuple[int, int]


_reductions: dict[tuple[ReductionKey, collectives.Group], TreeReduction] = {}


def allreduce_gradients(
    gradients: Any,
    *,
    compression: str = "none",
    average: bool = True,
    seed: int = 0,
    process_set: collectives.Group = None,
    name: str = "",
) -> Any:
    """Return the mean (or the sum) over ranks of a tree of gradients: new arrays of the same types.

    Call it outside of jit, on all ranks alike. What compression does not send is kept, and sent by later calls with a
    tree of the same structure, types and shapes and the same arguments.

    Args:
        gradients: a pytree of jax.Arrays or numpy arrays, of numbers with a fraction.
        compression: a specification (`hvdtrain.compression.spec`).
        average: whether the gradients are averaged; else summed, as if ranks have different numbers of examples.
        seed: of compression's randomness, the same on all ranks.
        process_set: the ranks that train this model together; None: all.
        name: distinguishes trees of the same structure, such as the gradients of two networks that are alike.

    Raises:
        UserError: it is called within jit, for a leaf that is no such array, a compression that is not valid, and on
            all ranks if their trees differ.
    """
    leaves, arrays, structure = flatten_tree(gradients, CALL)
    check_dtypes(leaves)
    if not leaves:
        return gradients
    world = collectives.rank(process_set), collectives.size(process_set)
    key = ReductionKey(tuple(leaves), structure, compression, average, seed, name, world), process_set
    reduction = _reductions.get(key)
    if reduction is None:
        reduction = TreeReduction(leaves, key[0], process_set)
        _reductions[key] = reduction
    try:
        return jax.tree.unflatten(structure, reduction.reduce(arrays))
    except BaseException:  # what it had under way is not for a world that may come
        _reductions.pop(key, None)
        raise


class TreeReduction:
    """The exchange of one kind of tree."""

    def __init__(self, leaves: Sequence[Leaf], key: ReductionKey, group: collectives.Group) -> None:
        """Make the exchange on one rank; the ranks agree in `reduce`."""
        self.leaves, self.group = leaves, group
        self.part = make_consistent_part(
            CALL, leaves, compression=key.compression, average=key.average, seed=key.seed, name=key.name
        )
        self.config = ExchangeConfig(
            average=key.average,
            spec=parse_compression(key.compression),
            seed=key.seed,
            name=f"jax.{self.part.values_digest.hex()[:8]}.",
            group=group,
        )
        self.shadows: list[torch.nn.Parameter] = []  # stand for the arrays in the exchange, without memory
        self.exchange: BucketedExchange | None = None
        self.cutter: BucketCutter | None = None

    def reduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the sums or means of these arrays over ranks, in new memory."""
        if collectives.size(self.group) == 1:
            return [np.array(x) if leaf.is_numpy else x for leaf, x in zip(self.leaves, arrays, strict=True)]
        jax.block_until_ready(arrays)  # type: ignore[no-untyped-call]
        tensors = [export_array(array) for array in arrays]
        check_agreement("jax.agreement", [self.part], self.group)
        if self.exchange is None:
            self.exchange = self._make_exchange(tensors)
        for shadow, tensor in zip(self.shadows, tensors, strict=True):
            shadow.grad = tensor
        self.exchange.finish_exchange()
        if self.cutter is None:
            self.cutter = BucketCutter.of_buckets(self.exchange.buckets, self.leaves)
        cut = iter(self.cutter.cut_arrays())
        return [
            copy_to_numpy(shadow.grad, leaf.dtype) if leaf.is_numpy and shadow.grad is not None else next(cut)
            for leaf, shadow in zip(self.leaves, self.shadows, strict=True)
        ]

    def _make_exchange(self, tensors: Sequence[torch.Tensor]) -> BucketedExchange:
        self.shadows = [
            torch.nn.Parameter(torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)) for t in tensors
        ]
        names = [leaf.name for leaf in self.leaves]
        exchange = BucketedExchange(list(zip(names, self.shadows, strict=True)), self.config)
        exchange.close()  # no backward pass reaches the shadows, so that no hook is needed
        return exchange


@dataclass(frozen=True)
class Cut:
    """Where a leaf lies in the flat tensors of the buckets."""

    flat: int
    offset: int  # in real values
    leaf: Leaf


@dataclass
class BucketCutter:
    """Cuts JAX's leaves out of buckets, in one jitted function.

    Attributes:
        flats: the buckets' flat tensors, which stay where they are.
        cuts: of JAX's leaves, in their order in the tree.
    """

    flats: list[torch.Tensor]
    cuts: list[Cut]
    program: Any = field(init=False)

    def __post_init__(self) -> None:
        self.program = jax.jit(lambda flats: [cut_leaf(flats[cut.flat], cut) for cut in self.cuts])

    @classmethod
    def of_buckets(cls, buckets: Sequence[Bucket], leaves: Sequence[Leaf]) -> BucketCutter:
        """Return the cutter of the leaves that are not numpy's."""
        by_name = {leaf.name: leaf for leaf in leaves if not leaf.is_numpy}
        found: dict[str, Cut] = {}
        flats: list[torch.Tensor] = []
        for bucket in buckets:
            offset, own = 0, dict[str, Cut]()
            for name, view in zip(bucket.names, bucket.split_flat(bucket.reducer.flat), strict=True):
                if name in by_name:
                    own[name] = Cut(len(flats), offset, by_name[name])
                offset += len(view)
            if own:
                flats.append(bucket.reducer.flat)
                found |= own
        return cls(flats, [found[leaf.name] for leaf in leaves if leaf.name in found])

    def cut_arrays(self) -> list[Array]:
        """Return the leaves as they are in the buckets now, in new memory."""
        if not self.cuts:
            return []
        found: list[Array] = self.program([jnp.from_dlpack(flat, copy=False) for flat in self.flats])
        return jax.block_until_ready(found)  # type: ignore[no-untyped-call, no-any-return]


def cut_leaf(flat: Array, cut: Cut) -> Array:
    """Return a leaf out of a flat array; it is traced."""
    leaf, size = cut.leaf, int(np.prod(cut.leaf.shape, dtype=np.int64))
    if "complex" in leaf.dtype:
        pairs = flat[cut.offset : cut.offset + 2 * size].reshape(-1, 2)
        return jax.lax.complex(pairs[:, 0], pairs[:, 1]).reshape(leaf.shape)
    # A copy: JAX returns an argument itself if a leaf is all of it.
    return jnp.copy(flat[cut.offset : cut.offset + size].reshape(leaf.shape).astype(leaf.dtype))


def check_dtypes(leaves: Sequence[Leaf]) -> None:
    """Raise UserError, naming it, for a leaf whose numbers have no gradient, or cannot be exchanged."""
    for leaf in leaves:
        if leaf.dtype not in SUPPORTED_NAMES:
            raise UserError(
                f"{CALL}: {leaf.name!r} is {leaf.dtype}; expected {', '.join(SUPPORTED_NAMES[:-1])} or "
                f"{SUPPORTED_NAMES[-1]}: leave it out of the tree"
            )
