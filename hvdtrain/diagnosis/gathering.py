"""What the ranks of a program report of themselves, and rank 0's comparison of it. No collectives: ranks may end early.

Ranks send their steps in parts of any length; what all ranks have reported is compared.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hvdtrain.diagnosis.comparison import Comparison
from hvdtrain.diagnosis.drift import Drift, find_drift
from hvdtrain.diagnosis.links import find_slow_link
from hvdtrain.diagnosis.straggler import MIN_COMPARED_STEPS, StepTimes, count_group_steps
from hvdtrain.system.gpu import GpuReading
from hvdtrain.system.tcp_info import TcpTraffic

MIN_INTERVAL_STEPS = 10
MAX_PAST_TRAFFIC = 10_000  # counts of connections that the end's table is about
MAX_WAITING_ROWS = 100_000  # steps of a rank that are kept while another one reports nothing


@dataclass(frozen=True)
class StateChecksums:
    """The checksums of a rank's parameters after a step; names: only in the first."""

    step: int
    values: list[int]
    names: list[str]


@dataclass(frozen=True)
class RankReport:
    """What a rank reports since its last report.

    Attributes:
        rank: its number.
        host: its host.
        rows: of each step, the seconds of TIME_PARTS and STOLEN.
        traffic: what its connections have sent.
        checksums: of its parameters.
        gpu: its GPU as it is now, if it has one.
        ended: whether this is its last report.
    """

    rank: int
    host: str
    rows: list[list[float]]
    traffic: list[TcpTraffic]
    checksums: list[StateChecksums]
    gpu: GpuReading | None
    ended: bool


@dataclass
class _RankState:
    """What a rank has reported and was not compared yet."""

    host: str = "?"
    rows: list[list[float]] = field(default_factory=list)
    traffic: list[TcpTraffic] = field(default_factory=list)
    past_traffic: deque[TcpTraffic] = field(default_factory=lambda: deque(maxlen=MAX_PAST_TRAFFIC))
    checksums: dict[int, list[int]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    gpu: GpuReading | None = None
    ended: bool = False


class Gathering:
    """Rank 0's view of all ranks of a program."""

    def __init__(self, size: int, path: Path) -> None:
        """Begin with `size` ranks that have reported nothing; path: of diagnose.json."""
        self._ranks = [_RankState() for _ in range(size)]
        self._path = path
        self._comparison: Comparison | None = None  # once all ranks have reported

    def add_report(self, report: RankReport) -> None:
        """Add what a rank reports; its reports come in order."""
        state = self._ranks[report.rank]
        state.host, state.gpu, state.ended = report.host, report.gpu, report.ended
        if len(state.rows) < MAX_WAITING_ROWS:
            state.rows += report.rows
        state.traffic += report.traffic
        for checksums in report.checksums:
            state.checksums[checksums.step] = checksums.values
            state.names = checksums.names or state.names

    def have_all_ended(self) -> bool:
        """Return whether every rank has sent its last report."""
        return all(state.ended for state in self._ranks)

    def compare_ranks(self, *, ends: bool = False) -> list[str]:
        """Compare the steps that all ranks have reported, if they are enough, or at the end; return lines to print."""
        lines = self._compare_replicas()
        count = min(len(state.rows) for state in self._ranks)
        if count == 0:
            return lines
        times: StepTimes = np.array([state.rows[:count] for state in self._ranks]).transpose(1, 0, 2)
        if not ends and count < max(MIN_INTERVAL_STEPS, MIN_COMPARED_STEPS * count_group_steps(times)):
            return lines
        comparison = self._comparison or Comparison([state.host for state in self._ranks], self._path)
        self._comparison = comparison
        slow_link = find_slow_link(times, [state.traffic for state in self._ranks])
        gpus = [state.gpu for state in self._ranks]
        gpus = gpus if any(gpus) else []
        table = comparison.add_interval(times, comparison.last_step + count, slow_link, gpus)
        for state in self._ranks:
            del state.rows[:count]
            state.past_traffic += state.traffic
            state.traffic.clear()
        return lines if ends else [*lines, *table, *comparison.write_report()]

    def conclude(self) -> list[str]:
        """Compare the rest and write the final report; return lines to print."""
        lines = self.compare_ranks(ends=True)
        if self._comparison is None:
            silent = [rank for rank, state in enumerate(self._ranks) if state.host == "?"]
            absent = f"; nothing came from rank {', '.join(map(str, silent))}" if silent else ""
            return [*lines, f"diagnose  no step was compared{absent}"]
        missing = [str(rank) for rank, state in enumerate(self._ranks) if not state.ended]
        if missing:
            lines.append(f"diagnose  the end is without rank {', '.join(missing)}, which did not report it in time")
        traffic = [state.past_traffic for state in self._ranks]
        end, table = self._comparison.conclude(lambda times: find_slow_link(times, traffic))
        return [*lines, *table, *self._comparison.write_report(end)]

    def _compare_replicas(self) -> list[str]:
        """Compare the parameters of the oldest step of which all ranks have sent checksums."""
        shared = set.intersection(*(set(state.checksums) for state in self._ranks))
        lines: list[str] = []
        for step in sorted(shared):
            drift = find_drift(
                [dict(zip(state.names, state.checksums.pop(step), strict=False)) for state in self._ranks]
            )
            if drift is not None and (self._comparison is None or self._comparison.drift is None):
                lines.append(self._report_drift(drift, step))
        return lines

    def _report_drift(self, drift: Drift, step: int) -> str:
        comparison = self._comparison or Comparison([state.host for state in self._ranks], self._path)
        self._comparison = comparison
        text = comparison.record_drift(drift, step)
        comparison.write_report()
        return f"diagnose  the replicas differ after step {step}: {text}"
