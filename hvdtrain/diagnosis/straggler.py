"""Find the rank that the others wait for, and why, by the times of all ranks' steps. No collectives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What the time between the ends of two exchanges goes to: loading batches; forward and backward, until the last
# gradient is ready; waiting for the exchange; and all between the steps: the update, reports, evaluations, checkpoints.
TIME_PARTS = ("data", "compute", "wait", "between")
WAIT_INDEX = TIME_PARTS.index("wait")
NON_WAIT_INDEXES = [place for place in range(len(TIME_PARTS)) if place != WAIT_INDEX]
MIN_COMPARED_STEPS = 8  # fewer steps show no straggler
MIN_COST_SHARE = 0.1  # of a step: what a straggler costs at least
# The part of the steps that may cost less than half of the median. Nine of ten steps that agree come by chance once in
# some hundreds of intervals of ten, if steps vary by a third of their length, and never in long ones.
MAX_OUTLIER_FRACTION = 0.1

StepTimes = NDArray[np.float64]  # (steps, ranks, TIME_PARTS): seconds


@dataclass(frozen=True)
class Straggler:
    """The rank that waits least while the others wait."""

    rank: int
    cost: float  # seconds a step that the others wait longer than it does
    share: float  # of the step
    cause: str  # of TIME_PARTS: which of its own times is longer than the others'
    longer: float  # seconds a step, by how much


def find_straggler(times: StepTimes) -> Straggler | None:
    """Return the straggler, or None if the steps do not clearly show one.

    Steps are compared one by one, each with the others' median: what slows all ranks alike takes no part, and a step
    that was slow by chance counts as one step, however slow it was. Named is who costs the others a tenth of the step
    or more, in the median of the steps and about as much in nearly all of them.
    """
    steps, ranks, _ = times.shape
    if ranks < 2 or steps < MIN_COMPARED_STEPS:
        return None
    waits = times[:, :, WAIT_INDEX]
    rank = int(np.argmin(np.median(waits, axis=0)))
    # What at least half of the others wait longer: if one of two others is as slow, there is no straggler.
    others = np.sort(np.delete(waits, rank, axis=1), axis=1)
    lost = others[:, (ranks - 2) // 2] - waits[:, rank]
    cost = float(np.median(lost))
    step = float(np.median(times.sum(axis=2)))
    if cost <= 0 or cost < MIN_COST_SHARE * step:
        return None
    if np.sort(lost)[int(MAX_OUTLIER_FRACTION * steps)] < cost / 2:
        return None
    longer = np.median(compute_excess(times, rank), axis=0)
    cause = max(NON_WAIT_INDEXES, key=lambda part: longer[part])
    return Straggler(rank, cost, cost / step, TIME_PARTS[cause], float(longer[cause]))


def compute_excess(times: StepTimes, rank: int) -> NDArray[np.float64]:
    """Return (steps, TIME_PARTS): by how much each time of a rank exceeds the others' median in the same step."""
    return times[:, rank] - np.median(np.delete(times, rank, axis=1), axis=1)
