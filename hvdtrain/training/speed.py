"""How fast a rank's steps are: since the last row, and in the whole run."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    """What a step took on this rank."""

    examples: int  # of the global batch
    seconds: float
    waited_seconds: float  # for communication


@dataclass(frozen=True)
class StepRates:
    """How fast steps were."""

    samples_per_second: float
    step_seconds_median: float
    comm_seconds_median: float  # waited for communication


class SpeedMeter:
    """Collects the times of steps."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._waited_seconds: list[float] = []
        self._examples = 0
        self._since_row: list[StepTime] = []
        self._next_seconds = self._next_waited = 0.0

    def add_to_next_step(self, seconds: float, waited_seconds: float) -> None:
        """Count time between two steps, such as the end of a round takes, with the next one."""
        self._next_seconds += seconds
        self._next_waited += waited_seconds

    def record(self, step: StepTime) -> None:
        """Add a step."""
        step = StepTime(step.examples, step.seconds + self._next_seconds, step.waited_seconds + self._next_waited)
        self._next_seconds = self._next_waited = 0.0
        self._seconds.append(step.seconds)
        self._waited_seconds.append(step.waited_seconds)
        self._examples += step.examples
        self._since_row.append(step)

    def start_row(self) -> None:
        """Let the next row begin after the last step."""
        self._since_row.clear()

    def row_rate(self) -> float:
        """Return examples per second since the last row; NaN if there was no step."""
        seconds = sum(step.seconds for step in self._since_row)
        return sum(step.examples for step in self._since_row) / seconds if seconds else math.nan

    def row_wait(self) -> float:
        """Return the mean seconds that a step has waited for communication since the last row; NaN if none was."""
        waited = [step.waited_seconds for step in self._since_row]
        return statistics.fmean(waited) if waited else math.nan

    def measure_rates(self) -> StepRates:
        """Return how fast this rank's steps were so far."""
        seconds = sum(self._seconds)
        return StepRates(
            samples_per_second=self._examples / seconds if seconds else 0.0,
            step_seconds_median=statistics.median(self._seconds) if self._seconds else 0.0,
            comm_seconds_median=statistics.median(self._waited_seconds) if self._waited_seconds else 0.0,
        )
