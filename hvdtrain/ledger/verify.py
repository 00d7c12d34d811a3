"""Replaying the ledger: did every epoch visit every id exactly once?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvdtrain.ledger.epoch_order import EpochOrder, MaterializedOrder
from hvdtrain.ledger.writer import LedgerRow, Segment, find_segments, read_segment
from hvdtrain.recipe.order import MAX_EXAMPLES, Ids
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.text import format_count

SEED_BOUND = 1 << 64  # how many there are
MAX_SHOWN = 10  # ids, of however many there are


@dataclass(frozen=True)
class LedgerDefect:
    """Something that is not as it should be."""

    kind: str  # file, step, place, ids or epoch
    text: str
    step: int | None = None
    epoch: int | None = None
    missing: list[int] = field(default_factory=list)  # ids, NAMED at most
    repeated: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class LedgerVerification:
    """What a ledger proves, or what is wrong."""

    findings: list[LedgerDefect]
    epochs: int  # complete ones
    examples: int
    steps: int
    segments: int
    rest: int  # examples of the last epoch so far; 0: it is complete

    @property
    def is_exactly_once(self) -> bool:
        return not self.findings

    def format_lines(self) -> list[str]:
        """For people: a summary, and below it what is wrong."""
        count = f"{format_count(self.epochs, 'epoch')} x {self.examples} examples"
        if self.rest:
            count += f" and {self.rest} examples of epoch {self.epochs + 1}, which is not complete"
        count += f", {format_count(self.steps, 'step')} ({format_count(self.segments, 'segment')})"
        if self.is_exactly_once:
            return [f"exactly once: {count}"]
        shown = [finding.text for finding in self.findings[:MAX_SHOWN]]
        more = len(self.findings) - len(shown)
        return [f"not exactly once: {count}", *shown, *([f"and {more} more findings"] if more else [])]

    def as_json(self) -> dict[str, Any]:
        return {"exactly_once": self.is_exactly_once, **asdict(self)}


class ReplayedStep(NamedTuple):
    """A row and the ids that its step fed to the model, as far as is known."""

    row: LedgerRow
    order: EpochOrder
    missing: Ids  # of those that the row names, these were not fed
    extra: Ids  # besides those that the row names, these were fed


def verify_ledger(run_dir: Path) -> LedgerVerification:
    """Replay a run's ledger.

    Raises UserError where there is none or a segment's header is damaged, RunError where a header says what cannot be.
    """
    paths = find_segments(run_dir / "ledger")
    if not paths:
        raise UserError(f"{run_dir} has no ledger: there is no {run_dir / 'ledger'}/segment-000001.csv")
    segments = [read_segment(path) for path in paths.values()]
    for segment in segments:
        if segment.seed >= SEED_BOUND or segment.examples > MAX_EXAMPLES:
            raise RunError(f"{segment.name} is of no run: seed {segment.seed}, {segment.examples} examples")
    try:
        return _replay_segments(paths, segments)
    except MemoryError:
        most = max(segments, key=lambda segment: segment.examples)
        raise RunError(f"{most.name}: {most.examples} examples are more than this machine has memory for") from None


def _replay_segments(paths: dict[int, Path], segments: list[Segment]) -> LedgerVerification:
    findings = [
        LedgerDefect("file", f"segment-{number:06}.csv is missing")
        for number in range(1, max(paths))
        if number not in paths
    ]
    for segment in segments:
        findings += [LedgerDefect("file", f"{segment.name}: line {line} is no row") for line in segment.invalid_lines]
    steps: list[ReplayedStep] = []
    rows = effective_rows(segments)
    for i, (row, segment) in enumerate(rows):
        findings += check_position(row, segment, steps[-1] if steps else None)
        one, found = check_step_ids(row, segment, rows[i + 1][0] if i + 1 < len(rows) else None)
        findings += found
        steps.append(one)
    last = steps[-1] if steps else None
    rest = (last.row.offset + last.row.fed) % last.order.examples if last else 0
    epochs: dict[int, list[ReplayedStep]] = {}
    for one in steps:
        epochs.setdefault(one.row.epoch, []).append(one)
    for epoch, of_epoch in epochs.items():
        findings += check_epoch(epoch, of_epoch, complete=not (last and epoch == last.row.epoch and rest))
    complete = 0 if last is None else last.row.epoch - bool(rest)
    return LedgerVerification(findings, complete, segments[-1].examples, len(steps), len(segments), rest)


def effective_rows(segments: list[Segment]) -> list[tuple[LedgerRow, Segment]]:
    """The rows that no later segment supersedes, each with its segment."""
    kept: list[tuple[LedgerRow, Segment]] = []
    for segment in segments:
        kept = [(row, of) for row, of in kept if row.step < segment.first_step]
        kept += [(row, segment) for row in segment.rows]
    return kept


def check_position(row: LedgerRow, segment: Segment, before: ReplayedStep | None) -> Iterator[LedgerDefect]:
    """What is wrong with a row's place behind the one before."""
    expected = before.row.step + 1 if before else 1
    if row.step != expected:
        if row.step > expected:
            gap = f"step {expected} is" if row.step == expected + 1 else f"steps {expected} to {row.step - 1} are"
            text = f"{gap} missing"
        else:
            text = f"step {row.step} comes again after step {expected - 1}"
        yield LedgerDefect("step", text, row.step, row.epoch)
    if row.step < segment.first_step:
        text = f"step {row.step} stands in {segment.name}, which begins with step {segment.first_step}"
        yield LedgerDefect("step", text, row.step, row.epoch)
    place = (1, 0)
    if before is not None:
        place = (before.row.epoch, before.row.offset + before.row.fed)
        if place[1] == before.order.examples:
            place = (place[0] + 1, 0)
    if (row.epoch, row.offset) != place:
        text = f"step {row.step} begins at example {row.offset} of epoch {row.epoch}'s order"
        text += f", expected {place[1]} of epoch {place[0]}"
        yield LedgerDefect("place", text, row.step, row.epoch)


def check_step_ids(
    row: LedgerRow, segment: Segment, after: LedgerRow | None
) -> tuple[ReplayedStep, list[LedgerDefect]]:
    """Whether the ids that were fed are those that the row names; if not, which are, where that can be told."""
    none = np.empty(0, np.int64)
    order = EpochOrder(segment.examples, segment.seed, row.epoch, segment.order_version)
    as_named = ReplayedStep(row, order, none, none)
    end = row.offset + row.fed
    if row.epoch < 1 or row.step < 1 or row.fed < 1 or row.offset >= segment.examples:
        text = f"step {row.step}: {row.fed} examples from {row.offset} of epoch {row.epoch}'s order"
        text += f", which has {segment.examples}, cannot be"
        return as_named, [LedgerDefect("ids", text, row.step, row.epoch)]
    planned = planned_end(row, segment, after)
    as_told = end <= segment.examples and order.sum_hashes(row.offset, end) == row.hash_sum
    if as_told and (after is not None or end == planned):  # else the next row tells whether the end is right
        return as_named, []
    explained = explain_mismatch(order.materialize(), row, planned)
    step = f"step {row.step} (epoch {row.epoch})"
    if explained is None:
        text = f"{step}: the {row.fed} ids that were fed are not those of the order, and cannot be told"
        return as_named, [LedgerDefect("ids", text, row.step, row.epoch)]
    missing, extra = explained
    what = [f"{format_ids(missing)} not fed"] if len(missing) else []
    what += [f"{format_ids(extra)} fed {'instead' if what else 'besides'}"] if len(extra) else []
    few = (missing[:MAX_SHOWN].tolist(), extra[:MAX_SHOWN].tolist())
    finding = LedgerDefect("ids", f"{step}: {', '.join(what)}", row.step, row.epoch, *few)
    # From here on the row stands for what it should have fed, so that the next one follows on it.
    row = row._replace(fed=planned - row.offset)
    return ReplayedStep(row, order, missing, extra), [finding]


def planned_end(row: LedgerRow, segment: Segment, after: LedgerRow | None) -> int:
    """Where in the order a step should have ended: as the next one tells, or by the size of the batch."""
    if after is not None and after.step == row.step + 1:
        if (after.epoch, after.offset) == (row.epoch + 1, 0):
            return segment.examples
        if after.epoch == row.epoch and row.offset < after.offset <= segment.examples:
            return after.offset
    return min(row.offset + segment.batch, segment.examples)


def explain_mismatch(order: MaterializedOrder, row: LedgerRow, end: int) -> tuple[Ids, Ids] | None:
    """Ids that were not fed, and ids that were fed besides, which make up for what the ranks told.

    What can go wrong once: neighbours in the order (such as a rank's part) left out or fed twice, or one id in the
    place of another. A false explanation would need a hash that meets another by chance, one in four billion.
    """
    begin, count = row.offset, end - row.offset
    differs = row.hash_sum - int(order.hash_sums_before[end] - order.hash_sums_before[begin])
    none = np.empty(0, np.int64)
    if row.fed < count:
        width = count - row.fed
        sums = order.hash_sums_before[begin + width : end + 1] - order.hash_sums_before[begin : end + 1 - width]
        found = np.flatnonzero(sums == -differs)
        return (order.ids[begin + found[0] :][:width], none) if len(found) else None
    if row.fed > count:
        width = row.fed - count
        found = np.flatnonzero(order.hash_sums_before[width:] - order.hash_sums_before[:-width] == differs)
        return (none, order.ids[found[0] :][:width]) if len(found) else None
    wanted = order.hashes[begin:end] + differs
    pairs = np.isin(wanted, order.hashes)
    if not pairs.any():
        return None
    place = int(np.flatnonzero(pairs)[0])
    other = int(np.flatnonzero(order.hashes == wanted[place])[0])
    return order.ids[begin + place : begin + place + 1], order.ids[other : other + 1]


def check_epoch(epoch: int, steps: list[ReplayedStep], complete: bool) -> Iterator[LedgerDefect]:
    """Ids that an epoch did not visit, or visited several times; of an incomplete one, up to where it has come."""
    reach = steps[-1].order.examples if complete else max(one.row.offset + one.row.fed for one in steps)
    if is_covered_once(steps, reach):
        return
    visits = np.zeros(max(one.order.examples for one in steps), np.int32)
    for one in steps:
        visits[row_ids(one)] += 1
        visits[one.extra] += 1
        visits[one.missing] -= 1
    due = epoch_ids(steps[-1])[:reach]
    missing, repeated = np.sort(due[visits[due] < 1]), np.flatnonzero(visits > 1)
    what = []
    if len(missing):
        place = int(np.flatnonzero(due == missing[0])[0])
        before = max((one.row for one in steps if one.row.offset <= place), key=lambda row: row.offset, default=None)
        where = "before the first step"
        if before is not None:
            where = f"{'in' if place < before.offset + before.fed else 'after'} step {before.step}"
        what.append(f"{format_ids(missing)} not visited (id {missing[0]} was due {where})")
    if len(repeated):
        again = [str(one.row.step) for one in steps if repeated[0] in row_ids(one) or repeated[0] in one.extra]
        steps_of = f"step{'s' * (len(again) > 1)} {', '.join(again[:MAX_SHOWN])}"
        what.append(f"{format_ids(repeated)} visited again (id {repeated[0]} in {steps_of})")
    if what:
        text = f"epoch {epoch}: {'; '.join(what)}"
        yield LedgerDefect("epoch", text, None, epoch, missing[:MAX_SHOWN].tolist(), repeated[:MAX_SHOWN].tolist())


def is_covered_once(steps: list[ReplayedStep], reach: int) -> bool:
    """Whether the steps fed what they name, all of one order, whose first `reach` positions they name once each."""
    at = 0
    for one in steps:
        if one.order != steps[0].order or one.row.epoch < 1 or one.row.offset != at:
            return False
        if len(one.missing) or len(one.extra):
            return False
        at += one.row.fed
    return at == reach <= steps[0].order.examples


def epoch_ids(one: ReplayedStep) -> Ids:
    """The order of a step's epoch; no ids where there is no such epoch."""
    return one.order.materialize().ids if one.row.epoch > 0 else np.empty(0, np.int64)


def row_ids(one: ReplayedStep) -> Ids:
    """The ids that a row names."""
    return epoch_ids(one)[one.row.offset : one.row.offset + one.row.fed]


def format_ids(ids: Ids) -> str:
    """Ids for people, of many the first few."""
    more = f" and {len(ids) - MAX_SHOWN} more" if len(ids) > MAX_SHOWN else ""
    return f"id{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:MAX_SHOWN]))}{more}"
