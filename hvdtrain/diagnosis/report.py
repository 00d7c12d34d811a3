"""What diagnose.json holds: the fields are its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.diagnosis.straggler import TIME_PARTS, StepTimes, find_straggler


@dataclass(frozen=True)
class StragglerRow:
    """The rank that the others waited for; times in seconds a step."""

    host: str
    rank: int
    cost: float  # that the others waited longer than it did
    share: float  # of the step
    cause: str  # of TIME_PARTS
    longer: float  # by which its cause took longer than theirs


@dataclass(frozen=True)
class TimesSummary:
    """The median times of steps."""

    seconds: Sequence[Mapping[str, float]]  # by rank: the median of each of TIME_PARTS
    straggler: StragglerRow | None


@dataclass(frozen=True)
class IntervalSummary(TimesSummary):
    """The steps from one comparison to the next."""

    first_step: int
    last_step: int


@dataclass(frozen=True)
class FinalSummary(TimesSummary):
    """The last steps of a run."""

    steps: int


@dataclass(frozen=True)
class WorldHistory:
    """What was found while the same ranks trained together."""

    first_step: int
    last_step: int
    ranks: int
    named: dict[str, int]  # how many intervals a rank was the straggler in


@dataclass(frozen=True)
class DriftingRank:
    """A rank whose replica differs."""

    rank: int
    host: str


@dataclass(frozen=True)
class DriftSummary:
    """Replicas that differ after a step."""

    step: int
    tensor: str  # the first that differs
    majority: bool  # more than half of the ranks agree on it
    ranks: Sequence[DriftingRank]
    tensors: int  # how many differ


@dataclass(frozen=True)
class DiagnosisReport:
    """All of diagnose.json."""

    first_step: int
    last_step: int
    hosts: Sequence[str]  # by rank
    end: FinalSummary | None
    named: Mapping[str, int]
    intervals: Sequence[IntervalSummary]
    drift: DriftSummary | None
    earlier_worlds: Sequence[WorldHistory]


def summarize_medians(times: StepTimes) -> list[Mapping[str, float]]:
    """Return each rank's median times; times: (steps, ranks, TIME_PARTS) seconds."""
    medians = np.median(times, axis=0).round(6).tolist()
    return [dict(zip(TIME_PARTS, row, strict=True)) for row in medians]


def summarize_straggler(times: StepTimes, hosts: Sequence[str]) -> StragglerRow | None:
    """Return the straggler of some steps, if they clearly show one."""
    found = find_straggler(times)
    if found is None:
        return None
    cost, share, longer = (round(value, 6) for value in (found.cost, found.share, found.longer))
    return StragglerRow(hosts[found.rank], found.rank, cost, share, found.cause, longer)
