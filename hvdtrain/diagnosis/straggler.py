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
# A column of times of its own: the rank was ready to run, or stopped, and its core did not run it (a quota, another
# process, a stopped process). It is in the other parts as well.
STOLEN = "stolen"
# Causes that are not a part of the time: STOLEN is longer; a network link (links.py); a throttled GPU (gpus.py).
CORE, LINK, GPU = "core", "link", "gpu"
STOLEN_INDEX = len(TIME_PARTS)
MIN_COMPARED_STEPS = 8  # fewer steps show no straggler
MIN_COST_SHARE = 0.1  # of a step: what a straggler costs at least
# The part of the steps that may cost less than half of the median. Nine of ten steps that agree come by chance once in
# some hundreds of intervals of ten, if steps vary by a third of their length, and never in long ones. Twice as many may
# if the others lose half of their time, which hardly comes by chance.
MAX_OUTLIER_FRACTION = 0.1

MIN_STOLEN_SHARE = 0.5  # of what a straggler costs: what is stolen from it if its core is the cause
# A quota of CPU time takes a part of each 0.1 s, so that most of many short steps show nothing of it.
GROUP_SECONDS = 0.2

StepTimes = NDArray[np.float64]  # (steps, ranks, TIME_PARTS, or one more: STOLEN): seconds


@dataclass(frozen=True)
class Straggler:
    """The rank that waits least while the others wait."""

    rank: int
    cost: float  # seconds a step that the others wait longer than it does
    share: float  # of the step
    cause: str  # of TIME_PARTS: which of its own times is longer than the others'; or CORE, LINK or GPU
    longer: float  # seconds a step, by how much
    detail: str = ""  # of a LINK or a GPU, in words


def find_straggler(times: StepTimes) -> Straggler | None:
    """Return the straggler, or None if the steps do not clearly show one.

    Steps are compared one by one, each with the others' median: what slows all ranks alike takes no part, and a step
    that was slow by chance counts as one step, however slow it was. Named is who costs the others a tenth of the step
    or more, in the median of the steps and about as much in nearly all of them.
    """
    steps, ranks, _ = times.shape
    if ranks < 2 or steps < MIN_COMPARED_STEPS:
        return None
    parts = times[:, :, :STOLEN_INDEX]
    waits = parts[:, :, WAIT_INDEX]
    stolen = estimate_stolen(times)
    waits = np.maximum(waits - stolen, 0)  # a rank that is kept from running while it waits keeps the others waiting
    rank = int(np.argmin(np.median(waits, axis=0)))
    # What at least half of the others wait longer: if one of two others is as slow, there is no straggler.
    others = np.sort(np.delete(waits, rank, axis=1), axis=1)
    lost = others[:, (ranks - 2) // 2] - waits[:, rank]
    cost = float(np.median(lost))
    step = float(np.median(parts.sum(axis=2)))
    if cost <= 0 or cost < MIN_COST_SHARE * step:
        return None
    usual = float(np.median(np.delete(stolen, rank)))
    if stolen[rank] >= max(MIN_STOLEN_SHARE * cost + usual, 2 * usual):  # of a throttled core, steps differ much
        return Straggler(rank, cost, cost / step, CORE, float(stolen[rank]) - usual)
    allowed = MAX_OUTLIER_FRACTION * (2 if cost > step / 2 else 1)
    if np.sort(lost)[int(allowed * steps)] < cost / 2:
        return None
    longer = np.median(compute_excess(times, rank), axis=0)
    cause = max(NON_WAIT_INDEXES, key=lambda part: longer[part])
    return Straggler(rank, cost, cost / step, TIME_PARTS[cause], float(longer[cause]))


def estimate_stolen(times: StepTimes) -> NDArray[np.float64]:
    """Return (ranks,) the seconds a step that are stolen from each rank again and again; 0 if they are not measured.

    It is noticed late at times, so it is not known of a single step; what was stolen once does not count.
    """
    stolen = times[:, :, STOLEN_INDEX:].sum(axis=2)
    estimated: NDArray[np.float64] = np.minimum(stolen.mean(axis=0), 2 * np.median(stolen, axis=0))
    return estimated


def group_steps(times: StepTimes) -> StepTimes:
    """Return the means of groups of steps that last GROUP_SECONDS, or of fewer if there would be too few groups.

    Without STOLEN, returns the steps as they are.
    """
    steps, ranks, columns = times.shape
    if columns == STOLEN_INDEX or not steps:
        return times
    count = max(1, min(count_group_steps(times), steps // MIN_COMPARED_STEPS))
    whole = steps - steps % count
    grouped: StepTimes = times[:whole].reshape(-1, count, ranks, columns).mean(axis=1)
    return grouped


def count_group_steps(times: StepTimes) -> int:
    """Return how many steps last GROUP_SECONDS."""
    step = float(times[:, :, :STOLEN_INDEX].sum(axis=2).mean())
    return max(1, int(np.ceil(GROUP_SECONDS / max(step, 1e-6) - 0.1)))


def compute_excess(times: StepTimes, rank: int) -> NDArray[np.float64]:
    """Return (steps, TIME_PARTS): by how much each time of a rank exceeds the others' median in the same step."""
    return times[:, rank] - np.median(np.delete(times, rank, axis=1), axis=1)
