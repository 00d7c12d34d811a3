"""What diagnose.json holds: the fields are its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.diagnosis.straggler import STOLEN, TIME_PARTS, StepTimes, Straggler
from hvdtrain.system.gpu import GpuReading


@dataclass(frozen=True)
class StragglerRow:
    """The rank that the others waited for; times in seconds a step."""

    host: str
    rank: int
    cost: float  # that the others waited longer than it did
    share: float  # of the step
    cause: str  # of TIME_PARTS, or CORE, LINK or GPU
    longer: float  # by which its cause took longer than theirs
    detail: str  # of a LINK or a GPU, in words


@dataclass(frozen=True)
class TimesSummary:
    """The median times of steps."""

    # By rank: the median of each of TIME_PARTS, and of STOLEN if it was measured.
    seconds: Sequence[Mapping[str, float]]
    straggler: StragglerRow | None
    gpus: Sequence[GpuReading | None]  # by rank, as they are at the end; empty if no rank has a GPU


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
    shares: Sequence[int]  # of the batch, by rank, in 1,024ths, at the end; []: even, or not known
    named: Mapping[str, int]
    intervals: Sequence[IntervalSummary]
    drift: DriftSummary | None
    earlier_worlds: Sequence[WorldHistory]


def summarize_medians(times: StepTimes) -> list[Mapping[str, float]]:
    """Return each rank's median times; times: (steps, ranks, TIME_PARTS, or one more: STOLEN) seconds."""
    medians = np.median(times, axis=0).round(6).tolist()
    return [dict(zip((*TIME_PARTS, STOLEN)[: len(row)], row, strict=True)) for row in medians]


def build_straggler_row(found: Straggler | None, hosts: Sequence[str]) -> StragglerRow | None:
    """Return the straggler as diagnose.json has it."""
    if found is None:
        return None
    cost, share, longer = (round(value, 6) for value in (found.cost, found.share, found.longer))
    return StragglerRow(hosts[found.rank], found.rank, cost, share, found.cause, longer, found.detail)
