"""How a flat tensor is summed over ranks if each rank needs the sum of its own part only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.comm.uneven import all_to_all_parts_async, reduce_scatter_async
from hvdtrain.compression.plain_reducer import PlainReducer

MEASURED_BYTES, MEASURED_ROUNDS = 2 << 20, 3  # to choose how tensors are reduced


class PartOwner:
    """What reducers have that bring each rank the sum of its own part of `flat` only.

    Attributes:
        bounds: (ranks + 1,) where each rank's part of flat begins, and where the last one ends.
        lengths: of the parts.
        own_range: this rank's part.
        part: (own values,) the sum or mean of this rank's part, after `finish_reduction`.
        mirrored_part: the same of the part that this rank mirrors; empty if it mirrors none.
        parameter_bytes: of each updated value, which all ranks gather.
    """

    flat: Tensor

    def set_bounds(self, bounds: Sequence[int], rank: int, parameter_bytes: int) -> None:
        """Set what is whose; parameter_bytes: of each value."""
        self.bounds = tuple(bounds)
        self.lengths = [end - begin for begin, end in pairwise(bounds)]
        self.own_range = slice(bounds[rank], bounds[rank + 1])
        self.part = self.mirrored_part = self.flat[:0]
        self.parameter_bytes = parameter_bytes

    def drop_part(self) -> None:
        """Free the memory of the parts."""
        self.part = self.mirrored_part = self.flat[:0]


class ScatterReducer(PartOwner, PlainReducer):
    """Brings each rank the sum of its own part of `flat`: half of an all-reduce.

    By an all-to-all, whose parts each rank adds in the order of ranks, or by Horovod's reduce-scatter. On two ranks
    both add the same two numbers, as an all-reduce does. If parts are mirrored, each rank then sends its part's sum on
    to the rank that mirrors it: in a second round, so that both have the same bits.

    Attributes:
        unit: numbers of flat that stay together: 2 for complex values.
        uses_reduce_scatter: whether it is Horovod's, for which the parts must be cut as Horovod cuts them.
    """

    def __init__(self, plain: PlainReducer, bounds: Sequence[int], like: Tensor, mirrors: Sequence[int] = ()) -> None:
        """Take the place of a reducer that sums all of `flat`.

        Args:
            plain: that reducer.
            bounds: of the parts.
            like: a parameter whose type all in it have.
            mirrors: of each rank, whose part it mirrors; empty: none does.
        """
        super().__init__(plain.name, plain.flat, plain.average, plain.group)
        rank = collectives.rank(self.group)
        self.set_bounds(bounds, rank, like.dtype.to_real().itemsize)
        self.unit, self.uses_reduce_scatter = 2 if like.is_complex() else 1, False
        own = self.lengths[rank]
        self._mirror_lengths = [own * (mirrored == rank) for mirrored in mirrors]  # to each rank, in the second round
        self._second_handle: collectives.Handle | None = None

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a step: the others' parts of the gradients, and its own of the parameters."""
        own, others = self.own_range.stop - self.own_range.start, self.size - 1
        gradients = len(self.flat) - own + sum(self._mirror_lengths)
        return gradients * self.flat.element_size() + own * others * self.parameter_bytes

    def start_reduction(self, step: int) -> None:
        """Start the collective."""
        self._add_carried_over(self.flat)
        if self.uses_reduce_scatter:
            self._handle = reduce_scatter_async(self.flat.view(-1, self.unit), self.name, self.group)
        else:
            self._handle = all_to_all_parts_async(self.flat, self.lengths, self.name, self.group)

    def start_second_round(self, wait: bool = True) -> None:
        """Send the sum of this rank's part on, if it is mirrored; without `wait` only if it has arrived."""
        if self._mirror_lengths and self._handle is not None and (wait or collectives.is_complete(self._handle)):
            self._add_up_part()
            name = f"{self.name}.mirror"
            self._second_handle = all_to_all_parts_async(self.part, self._mirror_lengths, name, self.group)

    def finish_reduction(self) -> None:
        """Wait for this rank's part, and for the one that it mirrors."""
        self.start_second_round()
        if self._second_handle is None:
            self._add_up_part()
            return
        self._handle, self._second_handle = self._second_handle, None
        self.mirrored_part = self._wait_for_collective()

    def _add_up_part(self) -> None:
        received = self._wait_for_collective()
        if self.uses_reduce_scatter:
            self.part = received.view(-1)
        else:
            rows = received.view(self.size, self.own_range.stop - self.own_range.start)
            # What was received, as large as flat, is freed.
            self.part = rows[0] + rows[1] if self.size > 1 else rows[0]
            for row in rows[2:]:
                self.part += row
        if self.average:
            self.part /= self.size

    def sum_is_finite(self) -> bool:
        """Return True: no rank has the whole sum. Whoever has the parts looks, with all ranks."""
        return True


def prefers_reduce_scatter(largest: Tensor, name: str, group: collectives.Group) -> bool:
    """Return whether Horovod's reduce-scatter is faster than the all-to-all here; the same on all ranks.

    All ranks call this. Both are timed in turns, and rank 0 decides.

    Args:
        largest: like the largest tensor to be reduced; no more than 2 MiB of it are sent.
        name: of the collectives.
        group: the ranks; None: all.
    """
    size = collectives.size(group)
    flat = torch.zeros_like(largest[: MEASURED_BYTES // largest.element_size() // size * size])
    bounds = [rank * len(flat) // size for rank in range(size + 1)]
    plain = [PlainReducer(f"{name}.{way}", flat, average=False, group=group) for way in ("to_all", "scatter")]
    reducers = [ScatterReducer(reducer, bounds, flat) for reducer in plain]
    reducers[1].uses_reduce_scatter = True
    seconds: list[list[float]] = [[], []]
    for step in range(1 + MEASURED_ROUNDS):
        for reducer, found in zip(reducers, seconds, strict=True):
            begin = time.perf_counter()
            reducer.start_reduction(step)
            reducer.finish_reduction()
            found.append(time.perf_counter() - begin)
    to_all, scatter = (min(found[1:]) for found in seconds)
    return bool(collectives.broadcast_json(scatter < to_all, f"{name}.choice"))
