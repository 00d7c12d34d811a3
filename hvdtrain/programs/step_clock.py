"""The times of one step of a loop: marks are put while it runs, and read later, without waiting for a GPU.

    end of update        first forward               last gradient   DDP has waited        end of update
      | between, data ...      | compute, data ...        |    wait      | between, wait ...     |

`wait` is what was marked as waiting for other ranks, wherever it was. `data` is the wait for batches. `compute` is from
the first forward to the end of the last backward, but for both of these; `between` is all the rest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

Mark: TypeAlias = Any  # what a clock puts


class StepClock(Protocol):
    """Puts marks, and reads the time between them."""

    def put_mark(self) -> Mark:
        """Return a mark of this moment."""

    def has_passed(self, mark: Mark) -> bool:
        """Return whether the device has come to a mark."""

    def read_seconds(self, first: Mark, second: Mark) -> float:
        """Return the seconds from one mark that has passed to another one."""


class HostClock:
    """For models on the CPU: the host's time."""

    def put_mark(self) -> float:
        """See `StepClock.put_mark`."""
        return time.perf_counter()

    def has_passed(self, mark: float) -> bool:
        """See `StepClock.has_passed`."""
        return True

    def read_seconds(self, first: float, second: float) -> float:
        """See `StepClock.read_seconds`."""
        return second - first


class CudaClock:
    """For models on a GPU: events in the stream of the forward pass, which the GPU records when it comes to them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)

    def put_mark(self) -> Mark:
        """See `StepClock.put_mark`."""
        event: Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def has_passed(self, mark: Mark) -> bool:
        """See `StepClock.has_passed`."""
        return bool(mark.query())

    def read_seconds(self, first: Mark, second: Mark) -> float:
        """See `StepClock.read_seconds`."""
        return float(first.elapsed_time(second)) / 1000


@dataclass
class StepMarks:
    """What was marked in one step.

    Attributes:
        begin: the end of the update before.
        end: the end of this step's update.
        forward: the first forward.
        backward_end: the last backward, with the wait at its end.
        waits: begin and end of each wait for other ranks.
        waits_in_compute: how many of them ended between `forward` and `backward_end`.
        data, data_at_forward, data_at_backward_end: seconds of waiting for batches: in all, and until these marks.
        stolen: seconds in which the core did not run this rank.
    """

    begin: Mark
    end: Mark = None
    forward: Mark = None
    backward_end: Mark = None
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)
    waits_at_forward: int = 0
    waits_at_backward_end: int = 0
    data: float = 0.0
    data_at_forward: float = 0.0
    data_at_backward_end: float = 0.0
    stolen: float = 0.0

    def mark_forward(self, mark: Mark) -> None:
        """Mark the first forward; later ones of the step have no effect."""
        if self.forward is None:
            self.forward, self.waits_at_forward, self.data_at_forward = mark, len(self.waits), self.data

    def mark_backward_end(self, mark: Mark) -> None:
        """Mark the end of a backward; that of the last one counts."""
        self.backward_end, self.waits_at_backward_end, self.data_at_backward_end = mark, len(self.waits), self.data

    def read(self, clock: StepClock) -> list[float]:
        """Return the seconds of TIME_PARTS, and STOLEN, when `end` has passed."""
        total = clock.read_seconds(self.begin, self.end)
        waits = [clock.read_seconds(*pair) for pair in self.waits]
        # A GPU may still work while the host waits for a batch.
        data = min(self.data, max(total - sum(waits), 0.0))
        compute = 0.0
        if self.forward is not None and self.backward_end is not None:
            inside = sum(waits[self.waits_at_forward : self.waits_at_backward_end])
            data_inside = self.data_at_backward_end - self.data_at_forward
            compute = max(clock.read_seconds(self.forward, self.backward_end) - inside - data_inside, 0.0)
        between = max(total - data - compute - sum(waits), 0.0)
        return [round(value, 7) for value in (data, compute, sum(waits), between, self.stolen)]
