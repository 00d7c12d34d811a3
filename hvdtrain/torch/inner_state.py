"""The mean over ranks of an optimizer's state, where each rank has made steps of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.torch.tensors import view_as_real

KeyPath = tuple[int | str, ...]  # the keys that lead to a value


@dataclass(frozen=True)
class Entry:
    """A value of the state, as all ranks are told of it."""

    dtype: str  # of a tensor; "": a number or None; "?": it has no mean
    shape: tuple[int, ...]
    number: float | None = None  # a number, or a tensor without axes

    @property
    def is_averaged(self) -> bool:
        """Whether it is a tensor with axes, of which there is a mean."""
        return bool(self.dtype) and self.number is None


def average_optimizer_state(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Replace an optimizer's state by the mean over those ranks that have it; all ranks call this.

    Of single whole numbers, which count steps, it is the largest: a rank without examples has made fewer.

    Args:
        optimizer: between two steps.
        name: of the collectives.

    Raises:
        UserError: on all ranks, for a state that has no mean.
    """
    state = optimizer.state_dict()
    own = {json.dumps(path): value for path, value in iterate_state(state["state"])}
    described = {key: vars(describe_entry(value)) for key, value in own.items()}
    ranks = collectives.gather_json(described, f"{name}.state")
    entries: dict[str, Entry] = {}
    for key in dict.fromkeys(key for rank in ranks for key in rank):
        found = [Entry(**{**rank[key], "shape": tuple(rank[key]["shape"])}) for rank in ranks if key in rank]
        first = found[0]
        if any((entry.dtype, entry.shape) != (first.dtype, first.shape) for entry in found) or first.dtype == "?":
            raise UserError(
                f"--local-steps: {key} of the optimizer's state is not numbers, or has another shape on each rank: it "
                "has no mean over ranks, which checkpoints take"
            )
        numbers = [entry.number for entry in found if entry.number is not None]
        entries[key] = Entry(first.dtype, first.shape, combine_numbers(numbers) if numbers else None)
    counts = {key: sum(key in rank for rank in ranks) for key in entries}
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    wanted = {key: entry for key, entry in entries.items() if entry.is_averaged}
    own_tensors = {
        key: own.get(key, torch.zeros(e.shape, dtype=find_dtype(e), device=device)) for key, e in wanted.items()
    }
    averaged = average_tensors(own_tensors, counts, name)
    new: dict[Any, Any] = {}
    for key, entry in entries.items():
        value = averaged[key] if key in averaged else build_value(entry, own.get(key))
        *path, last = json.loads(key)
        place = new
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    optimizer.load_state_dict({**state, "state": new})


def iterate_state(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the values in nested dicts, and their paths."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from iterate_state(inner, (*path, key))


def describe_entry(value: Any) -> Entry:
    """Return what other ranks need to know of a value; its dtype is "?" if it has no mean."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.dim() == 0 and not value.is_complex():
            return Entry(dtype, (), float(value))
        has_mean = value.layout == torch.strided and (value.is_floating_point() or value.is_complex())
        return Entry(dtype if has_mean else "?", tuple(value.shape))
    if value is None:
        return Entry("", ())
    return Entry("", (), float(value)) if isinstance(value, (bool, int, float)) else Entry("?", ())


def combine_numbers(numbers: Sequence[float]) -> float:
    """Return the largest of whole numbers, the mean of others."""
    return max(numbers) if all(map(float.is_integer, numbers)) else math.fsum(numbers) / len(numbers)


def build_value(entry: Entry, own: Any) -> Any:
    """Return a number, as it is on all ranks now, as this rank had it; or None."""
    if entry.number is None:
        return None
    if not entry.dtype:
        return type(own)(entry.number) if own is not None else entry.number
    device = own.device if isinstance(own, Tensor) else None
    return torch.tensor(entry.number, dtype=getattr(torch, entry.dtype), device=device)


def average_tensors(own: Mapping[str, Tensor], counts: Mapping[str, int], name: str) -> dict[str, Tensor]:
    """Return the means over ranks, by key.

    Args:
        own: this rank's tensors, by the same keys in the same order on all ranks; 0 if it has none.
        counts: how many ranks have each.
        name: of the collectives.
    """
    means: dict[str, Tensor] = {}
    for wire in (torch.float32, torch.float64):
        tensors = {
            key: tensor
            for key, tensor in own.items()
            if (tensor.dtype.to_real() == torch.float64) == (wire == torch.float64)
        }
        if not tensors:
            continue
        reals = [view_as_real(tensor.detach()).to(wire).reshape(-1) / counts[key] for key, tensor in tensors.items()]
        total = collectives.wait(collectives.all_reduce_async_(torch.cat(reals), f"{name}.state.{wire}"))
        parts = torch.split(total, [len(real) for real in reals])
        for (key, tensor), part in zip(tensors.items(), parts, strict=True):
            means[key] = torch.empty_like(tensor)
            view_as_real(means[key]).copy_(part.view(view_as_real(tensor).shape))
    return means


def find_dtype(entry: Entry) -> torch.dtype:
    """Return the type of an entry's tensor."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return dtype
