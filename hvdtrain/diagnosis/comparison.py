"""Compare the times of all ranks, interval by interval: print who is slow when that changes, and write diagnose.json.

Shared by `--diagnose` of the trainer and `hvdtrain.diagnose` of any program. No collectives: every rank that has all
ranks' times comes to the same result, and the one that writes is chosen by the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.diagnosis.drift import Drift
from hvdtrain.diagnosis.gpus import explain_by_gpu, find_slow_gpus
from hvdtrain.diagnosis.report import (
    DiagnosisReport,
    DriftingRank,
    DriftSummary,
    FinalSummary,
    IntervalSummary,
    WorldHistory,
    build_straggler_row,
    summarize_medians,
)
from hvdtrain.diagnosis.straggler import (
    CORE,
    GPU,
    LINK,
    STOLEN,
    TIME_PARTS,
    StepTimes,
    Straggler,
    find_straggler,
    group_steps,
)
from hvdtrain.recipe.order import WHOLE_SHARE, is_even
from hvdtrain.recipe.shares import describe_shares
from hvdtrain.system.files import BufferedDocument, write_error_text
from hvdtrain.system.gpu import GpuReading
from hvdtrain.system.records import encode_record

FINAL_TABLE_STEPS = 1000  # steps that the end's table is about
MAX_INTERVALS = 30  # intervals in diagnose.json
MAX_TABLE_RANKS = 8  # ranks in a table
COLUMNS = (*TIME_PARTS, STOLEN)  # of tables, as far as the times have them


class Comparison:
    """What was found about the ranks of one world so far."""

    def __init__(
        self, hosts: Sequence[str], path: Path, from_step: int = 0, earlier_worlds: Sequence[WorldHistory] = ()
    ) -> None:
        """Begin after `from_step`.

        Args:
            hosts: the ranks' hosts.
            path: of diagnose.json.
            from_step: the step before the first one.
            earlier_worlds: of this run.
        """
        self.hosts, self.from_step, self.earlier_worlds = list(hosts), from_step, list(earlier_worlds)
        self.last_step = from_step
        self.named_counts: dict[str, int] = {}  # intervals, by the rank that was named
        self.shares: Sequence[int] = ()  # of the batch, by rank, in 1,024ths; (): not known, or even
        self.places: Sequence[str] = ()  # what each rank of a replica has of the model, if there are stages
        self.drift: DriftSummary | None = None
        self._recent_times: deque[StepTimes] = deque(maxlen=FINAL_TABLE_STEPS)  # each (1, ranks, parts)
        self._intervals: deque[IntervalSummary] = deque(maxlen=MAX_INTERVALS)
        self._last_straggler: Any = ""  # who was named in the last table
        self._gpus: list[GpuReading | None] = []  # of each rank, as of the last interval
        self._slow_gpus: dict[int, str] = {}  # of those, what makes them slow
        self._named_gpus: set[int] = set()  # ranks whose slow GPU was in a table
        self._report_file = BufferedDocument(path)

    def add_interval(
        self,
        times: StepTimes,
        last_step: int,
        slow_link: Straggler | None = None,
        gpus: Sequence[GpuReading | None] = (),
    ) -> list[str]:
        """Add the steps since the last interval; return a table to print if another straggler is named than before.

        Args:
            times: (steps, ranks, TIME_PARTS, or one more: STOLEN) seconds.
            last_step: the number of the last of them.
            slow_link: the rank behind a slow link, named if no rank's own time explains the wait.
            gpus: each rank's GPU as it is now; empty if no rank has one.
        """
        self._gpus, self._slow_gpus = list(gpus), find_slow_gpus(gpus)
        straggler = self._name_straggler(times, slow_link)
        first, self.last_step = self.last_step + 1, last_step
        self._recent_times.extend(times[i : i + 1] for i in range(len(times)))
        if straggler is not None:
            key = self.label_rank(straggler.rank)
            self.named_counts[key] = self.named_counts.get(key, 0) + 1
        row = build_straggler_row(straggler, self.hosts)
        self._intervals.append(IntervalSummary(summarize_medians(times), row, self._gpus, first, last_step))
        who = straggler and (straggler.rank, straggler.cause)
        if who == self._last_straggler and self._slow_gpus.keys() <= self._named_gpus:
            return []
        self._last_straggler = who
        return self._format_table(times, straggler, f"steps {first} to {last_step}")

    def _name_straggler(self, times: StepTimes, slow_link: Straggler | None) -> Straggler | None:
        found = explain_by_gpu(find_straggler(group_steps(times)), self._slow_gpus)
        if slow_link is None:
            return found
        explained = found is not None and found.longer >= found.cost / 2 and found.cost > slow_link.longer
        return found if explained else slow_link

    def record_drift(self, drift: Drift, step: int) -> str:
        """Keep that replicas differ after a step; return it in words."""
        ranks = [DriftingRank(rank, self.hosts[rank]) for rank in drift.ranks]
        self.drift = DriftSummary(step, drift.first_tensor, drift.has_majority, ranks, drift.num_differing)
        return describe_drift(drift, self.hosts)

    def label_rank(self, rank: int) -> str:
        stages = f" ({self.places[rank % len(self.places)]})" if self.places else ""
        return f"rank {rank} on {self.hosts[rank]}{stages}"

    def build_history(self) -> WorldHistory | None:
        """Return what was found in this world; None if nothing was compared."""
        if self.last_step == self.from_step:
            return None
        return WorldHistory(self.from_step + 1, self.last_step, len(self.hosts), self.named_counts)

    def conclude(
        self, find_link: Callable[[StepTimes], Straggler | None] = lambda _: None
    ) -> tuple[FinalSummary | None, list[str]]:
        """Return what is known of the last steps, and its table.

        Args:
            find_link: returns the rank behind a slow link.
        """
        if not self._recent_times:
            return None, []
        whole = np.concatenate(self._recent_times)
        straggler = self._name_straggler(whole, find_link(whole))
        lines = self._format_table(whole, straggler, f"the last {len(whole)} steps")
        named = [f"{rank} in {count}" for rank, count in sorted(self.named_counts.items())]
        if named:
            lines.append(f"          named in intervals: {', '.join(named)}")
        row = build_straggler_row(straggler, self.hosts)
        return FinalSummary(summarize_medians(whole), row, self._gpus, len(whole)), lines

    def write_report(self, end: FinalSummary | None = None) -> list[str]:
        """Write diagnose.json; return a line to print when that begins to fail, which ends nothing."""
        report = DiagnosisReport(
            first_step=self.from_step + 1,
            last_step=self.last_step,
            hosts=self.hosts,
            end=end,
            shares=self.shares,
            named=self.named_counts,
            intervals=list(self._intervals),
            drift=self.drift,
            earlier_worlds=self.earlier_worlds,
        )
        before = self._report_file.error
        self._report_file.hold(encode_record(report))
        self._report_file.flush()
        error = self._report_file.error
        if error is None or before is not None:
            return []
        path = self._report_file.path
        return [f"diagnose  {write_error_text(path.name, path.parent, error)}"]

    def _format_table(self, times: StepTimes, straggler: Straggler | None, steps: str) -> list[str]:
        medians = 1000 * np.median(times, axis=0)
        ranks = sorted(range(len(medians)), key=lambda rank: float(medians[rank, TIME_PARTS.index("wait")]))
        shown = ranks
        if len(ranks) > MAX_TABLE_RANKS:
            shown = [*ranks[: MAX_TABLE_RANKS // 2], *ranks[-MAX_TABLE_RANKS // 2 :]]
        width = max(len(self.label_rank(rank)) for rank in shown)
        title = f"diagnose  {steps}, medians in ms"
        lines = [title, f"          {'':{width}}" + "".join(f"{part:>9}" for part in COLUMNS[: medians.shape[1]])]
        for rank in sorted(shown):
            values = "".join(f"{value:9.1f}" for value in medians[rank])
            lines.append(f"          {self.label_rank(rank):{width}}{values}")
        if len(shown) < len(ranks):
            lines.append(f"          and {len(ranks) - len(shown)} ranks that wait neither least nor most")
        self._named_gpus |= self._slow_gpus.keys()
        gpus = [f"          GPU of {self.label_rank(rank)}: {text}" for rank, text in self._slow_gpus.items()]
        return [*lines, *gpus, f"          {self._describe_straggler(straggler)}{self._describe_share(straggler)}"]

    def _describe_share(self, straggler: Straggler | None) -> str:
        """Return what the shares of the batch have to do with it; "" for even ones."""
        if not self.shares or is_even(self.shares):
            return ""
        if straggler is None:
            return f"; the batch is dealt {describe_shares(self.shares)}"
        return f"; it has {self.shares[straggler.rank]} of {WHOLE_SHARE:,} of the batch"

    def _describe_straggler(self, straggler: Straggler | None) -> str:
        if len(self.hosts) == 1:
            return "one rank: there is nothing to compare"
        if straggler is None:
            return "no straggler"
        who, share = f"straggler {self.label_rank(straggler.rank)}", f"{straggler.share:.0%} of the step"
        if straggler.cause == LINK:
            return f"{who}: all wait {1000 * straggler.cost:.1f} ms a step, {share}; {straggler.detail}"
        cost = f"{who}: the others wait {1000 * straggler.cost:.1f} ms a step for it, {share}"
        if straggler.cause == CORE:
            longer = f"for {1000 * straggler.longer:.1f} ms a step longer than theirs"
            return f"{cost}; its core is throttled, shared or stopped: it is kept from running {longer}"
        if straggler.cause == GPU:
            return f"{cost}; its GPU takes {1000 * straggler.longer:.1f} ms longer than theirs: {straggler.detail}"
        return f"{cost}; its {straggler.cause} takes {1000 * straggler.longer:.1f} ms longer than theirs"


def describe_drift(drift: Drift, hosts: Sequence[str]) -> str:
    """Return which tensor differs on which ranks."""
    who = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in drift.ranks)
    if drift.has_majority:
        what = f"on {who}, {drift.first_tensor} is not what it is on the other {len(hosts) - len(drift.ranks)} ranks"
    else:
        what = f"{drift.first_tensor} differs across {who}, and no value has a majority"
    count = drift.num_differing - 1
    more = f"; {count} more tensor{'s' * (count > 1)} differ{'s' * (count == 1)}" if count else ""
    return what + more
