"""`--diagnose`: where each rank's time goes, whom the others wait for, and whether all replicas are still the same."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.diagnosis.drift import Drift, find_drift, hash_checksums
from hvdtrain.diagnosis.report import (
    DiagnosisReport,
    DriftingRank,
    DriftSummary,
    FinalSummary,
    IntervalSummary,
    WorldHistory,
    summarize_medians,
    summarize_straggler,
)
from hvdtrain.diagnosis.straggler import TIME_PARTS, StepTimes, Straggler, find_straggler
from hvdtrain.recipe.framework import Step
from hvdtrain.system.errors import RunError
from hvdtrain.system.files import BufferedDocument, write_error_text
from hvdtrain.system.records import encode_record

MIN_INTERVAL_STEPS = 10  # steps from one comparison to the next: fewer show little of a straggler
FINAL_TABLE_STEPS = 1000  # steps that the end's table is about
MAX_INTERVALS = 30  # intervals in diagnose.json
MAX_TABLE_RANKS = 8  # ranks in a table


class Diagnosis:
    """Collects the times of this rank's steps in one world; all ranks compare them, and their weights, at intervals.

    The loop hands over its batches, reports when an exchange has ended, and asks to compare after a step's update.
    """

    def __init__(
        self, world: World, folder: Path, log_every: int, from_step: int, earlier: Sequence[WorldHistory]
    ) -> None:
        """Begin after `from_step` in a run folder; earlier: of this run's earlier worlds."""
        self.world, self.path, self.earlier_worlds = world, folder / "diagnose.json", earlier
        self.interval = -(-MIN_INTERVAL_STEPS // log_every) * log_every
        self.from_step = self.last_compared_step = from_step
        self.hosts: list[str] = collectives.gather_json(world.host, "diagnose.hosts")
        self._step_times: list[list[float]] = []  # of each step since the last comparison: seconds by TIME_PARTS
        self._data_seconds = 0.0  # seconds that this step has waited for batches
        self._last_end_time = time.perf_counter()  # when the last exchange, or comparison, ended
        self._recent_times: deque[StepTimes] = deque(
            maxlen=FINAL_TABLE_STEPS
        )  # all ranks' times, (1, ranks, TIME_PARTS)
        self._intervals: deque[IntervalSummary] = deque(maxlen=MAX_INTERVALS)
        self._named_counts: dict[str, int] = {}  # intervals, by the rank that was named
        self._last_straggler: Any = ""  # who was named in the last table
        self._report_file = BufferedDocument(self.path)

    def time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches; the wait for them is this rank's data time."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data_seconds += time.perf_counter() - begin
            yield batch

    def record_exchange(self, start: float, waited: float) -> None:
        """Record that an exchange has ended.

        Args:
            start: when its step began, by time.perf_counter.
            waited: seconds that this rank waited for the exchange.
        """
        now = time.perf_counter()
        compute = now - start - self._data_seconds - waited
        row = {"data": self._data_seconds, "compute": compute, "wait": waited, "between": start - self._last_end_time}
        self._step_times.append([row[part] for part in TIME_PARTS])
        self._data_seconds, self._last_end_time = 0.0, now

    def is_comparison_due(self, step: int) -> bool:
        return step % self.interval == 0

    def compare_ranks(self, step: Step, number: int, *, ends: bool) -> list[str]:
        """Compare this world's ranks after a step; all call it. Returns lines to print.

        Raises RunError on all ranks if their replicas differ: a checkpoint would hold the state of one rank alone. It
        is called before anything is saved.
        """
        if not self._step_times and number == self.last_compared_step:  # the evaluation after it has ended the run
            return self._report_end(number) if ends else []
        checksums = step.checksum_state()
        rows = np.array(self._step_times)
        mine = np.append(rows.view(np.int64).reshape(-1), np.int64(hash_checksums(checksums)))
        everyone = collectives.gather_array(mine, "diagnose.times")
        drift = (
            find_drift(collectives.gather_json(checksums, "diagnose.drift")) if len(set(everyone[:, -1])) > 1 else None
        )
        times: StepTimes = everyone[:, :-1].copy().view(np.float64).reshape(-1, *rows.shape).transpose(1, 0, 2)
        self._recent_times.extend(times[i : i + 1] for i in range(len(times)))
        straggler = find_straggler(times)
        first, self.last_compared_step = self.last_compared_step + 1, number
        if straggler is not None:
            key = self.label_rank(straggler.rank)
            self._named_counts[key] = self._named_counts.get(key, 0) + 1
        slowest = summarize_straggler(times, self.hosts)
        self._intervals.append(IntervalSummary(summarize_medians(times), slowest, first, number))
        if drift is not None:
            self._write_report(number, drift=drift)
            collectives.gather_json(None, "diagnose.written")  # the first rank to leave ends the others
            raise RunError(self._describe_drift(drift, first - 1, number))
        lines: list[str] = []
        who = straggler and (straggler.rank, straggler.cause)
        if who != self._last_straggler:
            lines = self._format_table(times, straggler, f"steps {first} to {number}")
            self._last_straggler = who
        lines = self._report_end(number) if ends else [*lines, *self._write_report(number, None)]
        self._step_times.clear()
        self._last_end_time = time.perf_counter()
        return lines

    def _report_end(self, number: int) -> list[str]:
        """Write the report of a run that ends; return lines to print."""
        whole = np.concatenate(self._recent_times)
        lines = self._format_table(whole, find_straggler(whole), f"the last {len(whole)} steps")
        named = [f"{rank} in {count}" for rank, count in sorted(self._named_counts.items())]
        if named:
            lines.append(f"          named in intervals of {self.interval} steps: {', '.join(named)}")
        return lines + self._write_report(number, whole)

    def build_history(self) -> list[WorldHistory]:
        """Return what the next world is to know of this one and those before it."""
        if self.last_compared_step == self.from_step:
            return list(self.earlier_worlds)
        own = WorldHistory(self.from_step + 1, self.last_compared_step, self.world.size, self._named_counts)
        return [*self.earlier_worlds, own]

    def label_rank(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _write_report(self, number: int, whole: StepTimes | None = None, drift: Drift | None = None) -> list[str]:
        """Write diagnose.json on rank 0; return a line to print when it begins to fail, which does not end the run."""
        if self.world.rank != 0:
            return []
        found = None
        if drift is not None:
            ranks = [DriftingRank(rank, self.hosts[rank]) for rank in drift.ranks]
            found = DriftSummary(number, drift.first_tensor, drift.has_majority, ranks, drift.num_differing)
        end = None
        if whole is not None:
            end = FinalSummary(summarize_medians(whole), summarize_straggler(whole, self.hosts), len(whole))
        report = DiagnosisReport(
            first_step=self.from_step + 1,
            last_step=number,
            hosts=self.hosts,
            end=end,
            named=self._named_counts,
            intervals=list(self._intervals),
            drift=found,
            earlier_worlds=self.earlier_worlds,
        )
        before = self._report_file.error
        self._report_file.hold(encode_record(report))
        self._report_file.flush()
        error = self._report_file.error
        if error is None or before is not None:
            return []
        return [f"diagnose  {write_error_text(self.path.name, self.path.parent, error)}"]

    def _format_table(self, times: StepTimes, straggler: Straggler | None, steps: str) -> list[str]:
        medians = 1000 * np.median(times, axis=0)
        ranks = sorted(range(len(medians)), key=lambda rank: float(medians[rank, TIME_PARTS.index("wait")]))
        shown = (
            ranks
            if len(ranks) <= MAX_TABLE_RANKS
            else [*ranks[: MAX_TABLE_RANKS // 2], *ranks[-MAX_TABLE_RANKS // 2 :]]
        )
        width = max(len(self.label_rank(rank)) for rank in shown)
        title = f"diagnose  {steps}, medians in ms"
        lines = [title, f"          {'':{width}}" + "".join(f"{part:>9}" for part in TIME_PARTS)]
        for rank in sorted(shown):
            lines.append(
                f"          {self.label_rank(rank):{width}}" + "".join(f"{value:9.1f}" for value in medians[rank])
            )
        if len(shown) < len(ranks):
            lines.append(f"          and {len(ranks) - len(shown)} ranks that wait neither least nor most")
        return [*lines, f"          {self._describe_straggler(straggler)}"]

    def _describe_straggler(self, straggler: Straggler | None) -> str:
        if self.world.size == 1:
            return "one rank: there is nothing to compare"
        if straggler is None:
            return "no straggler"
        return (
            f"straggler {self.label_rank(straggler.rank)}: the others wait {1000 * straggler.cost:.1f} ms a step "
            f"for it, "
            f"{straggler.share:.0%} of the step; its {straggler.cause} takes {1000 * straggler.longer:.1f} ms longer "
            "than theirs"
        )

    def _describe_drift(self, drift: Drift, held: int, number: int) -> str:
        who = ", ".join(self.label_rank(rank) for rank in drift.ranks)
        if drift.has_majority:
            what = (
                f"on {who}, {drift.first_tensor} is not what it is on the other "
                f"{self.world.size - len(drift.ranks)} ranks"
            )
        else:
            what = f"{drift.first_tensor} differs across {who}, and no value has a majority"
        count = drift.num_differing - 1
        more = f"; {count} more tensor{'s' * (count > 1)} differ{'s' * (count == 1)}" if count else ""
        return f"the replicas differ after step {number}, and were the same after step {held}: {what}{more}"
