"""How a flat tensor is summed over ranks without compression, and what all reducers share."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hvdtrain.comm import collectives


class Reducer:
    """What all reducers share: a flat tensor is summed or averaged over ranks, once per step.

    Attributes:
        name: of the bucket's collectives; the same on all ranks, and no other's.
        flat: (n,) any floating type: this rank's share at `start_reduction`, the sum or mean after `finish_reduction`.
        average: whether it is divided by the number of ranks.
        group: the ranks; None: all.
        carried_over: (n,) like flat: what an earlier reducer of the bucket had not sent; or None.
        waited: seconds that this step has waited for collectives.
    """

    def __init__(self, name: str, flat: Tensor, average: bool, group: collectives.Group) -> None:
        self.name, self.flat, self.average, self.group = name, flat, average, group
        self.size = collectives.size(group)
        self.waited = 0.0
        self.carried_over: Tensor | None = None
        self._handle: collectives.Handle | None = None

    def _add_carried_over(self, x: Tensor) -> None:
        self.waited = 0.0
        if self.carried_over is not None:
            x += self.carried_over

    def commit_step(self, unused: Sequence[tuple[int, int]] = ()) -> None:
        """Take note that a step was made with what was sent.

        Args:
            unused: ranges of flat whose sum nobody uses; what was carried over there is kept.
        """
        carried_over, self.carried_over = self.carried_over, None
        if carried_over is not None and unused:
            self.carried_over = torch.zeros_like(carried_over)
            for begin, end in unused:
                self.carried_over[begin:end] = carried_over[begin:end]

    def _wait_for_collective(self) -> Tensor:
        """Return the result of the collective that was started."""
        assert self._handle is not None
        begin = time.perf_counter()
        received = collectives.wait(self._handle)
        self.waited += time.perf_counter() - begin
        self._handle = None
        return received


class PlainReducer(Reducer):
    """Sums or averages `flat` by one all-reduce, without compression.

    Attributes:
        kept: (m,) int64: the values of flat that travel, the same on all ranks; others are zero in the sum; None: all.
    """

    def __init__(self, name: str, flat: Tensor, average: bool, group: collectives.Group = None) -> None:
        super().__init__(name, flat, average, group)
        self.kept: Tensor | None = None
        self._sent = flat

    def send_only(self, kept: Tensor | None) -> None:
        """Let only these values of flat travel, (m,) int64, the same on all ranks; None: all. Between two steps."""
        self.kept, self._sent = kept, self.flat if kept is None else self.flat.new_empty(len(kept))

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a step."""
        return collectives.ring_all_reduce_bytes(self._sent.numel() * self._sent.element_size(), self.size)

    def start_reduction(self, step: int) -> None:
        """Start the all-reduce."""
        self._add_carried_over(self.flat)
        if self.kept is not None:
            torch.index_select(self.flat, 0, self.kept, out=self._sent)
        self._handle = collectives.all_reduce_async_(self._sent, self.name, self.average, self.group)

    def start_second_round(self, wait: bool = True) -> None:
        """Do nothing: there is no second collective."""

    def finish_reduction(self) -> None:
        """Wait for the sum."""
        self._wait_for_collective()
        if self.kept is not None:
            self.flat.zero_().index_copy_(0, self.kept, self._sent)

    def sum_is_finite(self) -> bool:
        """Return whether the sum is finite; the same on all ranks."""
        # The sum of float16 values that are finite may not be.
        return bool(torch.isfinite(self.flat.sum(dtype=torch.promote_types(self.flat.dtype, torch.float32))))

    def total_unsent(self) -> Tensor | None:
        """Return what this rank still has to send, (n,); or None."""
        return self.carried_over
