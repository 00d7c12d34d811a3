"""Replaying a ledger: did every epoch visit every id exactly once, or as its sampler's order has them?

check                  kind of defect   what it compares
_find_file_defects     file             segments' numbers and lines, and files of orders
check_position         step, place      a row's step, epoch and offset with the end of the row before
check_step_ids         ids              count and sum of hashes with the order; a difference is explained, if it can be
replay_losses          owed             what was lost with a rank, and the steps that were made of it
check_made_version     place, ids       what a parameter server made a version of, and how old that was
check_epoch            epoch            how often each id was visited, by what the steps are known to have fed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hvdtrain.ledger.epoch_order import EpochOrder
from hvdtrain.ledger.explain import NO_IDS, explain_mismatch
from hvdtrain.ledger.owed import find_unknown_losses, replay_losses
from hvdtrain.ledger.reader import (
    Segment,
    find_segments,
    load_given_order,
    read_segment,
    select_effective_losses,
    select_effective_rows,
)
from hvdtrain.ledger.rows import LedgerRow
from hvdtrain.ledger.steps import MAX_SHOWN, LedgerDefect, ReplayedStep, format_ids
from hvdtrain.ledger.versions import AppliedAges, check_made_version, count_rest, measure_ages
from hvdtrain.ledger.visits import check_epoch
from hvdtrain.recipe.given_order import GivenOrder
from hvdtrain.recipe.order import MAX_EXAMPLES
from hvdtrain.recipe.ranges import Ranges, count_positions
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.text import format_count

SEED_BOUND = 1 << 64  # seeds are below it


@dataclass(frozen=True)
class LedgerVerification:
    """What a ledger proves, or what is wrong with it."""

    findings: list[LedgerDefect]
    epochs: int  # that are complete
    examples: int
    steps: int
    segments: int
    rest: int  # examples of the last epoch so far, without what it owes; 0: it is complete
    given_orders: int = 0  # epochs whose order the recipe's sampler gave
    shares: list[tuple[int, str]] = field(default_factory=list)  # uneven ones: from which step on, 1,024ths; "": even
    owed: int = 0  # examples that were lost with a rank in a round of local steps
    settled: int = 0  # of them that the others have trained again
    staleness: AppliedAges | None = None  # of the items that a parameter server has applied

    @property
    def is_as_ordered(self) -> bool:
        """Whether every epoch visited each id as often as its order has it, as far as it has come."""
        return not self.findings

    @property
    def is_exactly_once(self) -> bool:
        """Whether every epoch visited every id exactly once, as far as it has come: none had an order of its own."""
        return not self.findings and not self.given_orders

    def format_lines(self) -> list[str]:
        """Return a human-readable summary, and below it what is wrong."""
        count = f"{format_count(self.epochs, 'epoch')} x {self.examples} examples"
        if self.rest:
            count += f" and {self.rest} examples of epoch {self.epochs + 1}, which is not complete"
        count += f", {format_count(self.steps, 'step')} ({format_count(self.segments, 'segment')})"
        verdict = "as ordered" if self.given_orders else "exactly once"
        dealt = [f"{shares or 'even'} from step {step} on" for step, shares in self.shares]
        more = [f"and {len(dealt) - MAX_SHOWN} more"] if len(dealt) > MAX_SHOWN else []
        lines = [f"shares of the batch: {', '.join([*dealt[:MAX_SHOWN], *more])}"] if dealt else []
        lines += [f"owed: {self.owed} examples lost with a rank, {self.settled} trained again"] if self.owed else []
        lines += [self.staleness.describe()] if self.staleness is not None else []
        if self.is_as_ordered:
            return [f"{verdict}: {count}", *lines]
        shown = [finding.text for finding in self.findings[:MAX_SHOWN]]
        rest = len(self.findings) - len(shown)
        return [f"not {verdict}: {count}", *lines, *shown, *([f"and {rest} more findings"] if rest else [])]

    def as_json(self) -> dict[str, object]:
        """Return what `hvdtrain ledger verify --json` prints."""
        return {"exactly_once": self.is_exactly_once, "as_ordered": self.is_as_ordered, **asdict(self)}


def verify_ledger(run_dir: Path) -> LedgerVerification:
    """Replay a run's ledger.

    Raises:
        UserError: there is none, or a segment's header is damaged.
        RunError: a header has impossible values.
    """
    paths = find_segments(run_dir / "ledger")
    if not paths:
        raise UserError(f"{run_dir} has no ledger: there is no {run_dir / 'ledger'}/segment-000001.csv")
    segments = [read_segment(path) for path in paths.values()]
    for segment in segments:
        if segment.seed >= SEED_BOUND or segment.examples > MAX_EXAMPLES:
            raise RunError(f"{segment.name} has an invalid header: seed {segment.seed}, {segment.examples} examples")
    try:
        return _replay_segments(paths, segments)
    except MemoryError:
        most = max(segments, key=lambda segment: segment.examples)
        raise RunError(f"{most.name}: {most.examples} examples are more than this machine has memory for") from None


def _replay_segments(paths: dict[int, Path], segments: list[Segment]) -> LedgerVerification:
    defects = _find_file_defects(paths, segments)
    given, damaged = _load_orders(paths, segments)
    defects += damaged
    steps: list[ReplayedStep] = []
    losses = select_effective_losses(segments)
    rows = select_effective_rows(segments)
    for i, (row, segment) in enumerate(rows):
        defects += check_position(row, segment, steps[-1] if steps else None)
        order = make_epoch_order(row, segment, given)
        step, found = check_step_ids(row, segment, order, rows[i + 1][0] if i + 1 < len(rows) else None)
        defects += found
        steps.append(step)
    last = steps[-1] if steps else None
    defects += find_unknown_losses(steps, losses)
    by_epoch: dict[int, list[ReplayedStep]] = {}
    for step in steps:
        by_epoch.setdefault(step.row.epoch, []).append(step)
    pending = count_positions(replay_losses(by_epoch[last.row.epoch], losses, [])) if last else 0
    rest = (last.end - pending) % last.order.examples if last else 0
    made = {step.row.step: step.made for step in steps if step.made is not None}
    if last is not None and any(step.row.step in made for step in by_epoch[last.row.epoch]):
        rest = count_rest(by_epoch[last.row.epoch])
    for epoch, of_epoch in by_epoch.items():
        is_complete = not (last and epoch == last.row.epoch and rest)
        defects += check_epoch(epoch, of_epoch, losses, is_complete)
    complete = 0 if last is None else last.row.epoch - bool(rest)
    ordered = len({step.row.epoch for step in steps if step.order.key})
    shares = list_shares(rows)
    owed = sum(map(count_positions, losses.values())), sum(count_positions(step.owed) for step in steps)
    return LedgerVerification(
        defects,
        complete,
        segments[-1].examples,
        len(steps),
        len(segments),
        rest,
        ordered,
        shares,
        *owed,
        measure_ages(made),
    )


def list_shares(rows: list[tuple[LedgerRow, Segment]]) -> list[tuple[int, str]]:
    """Return from which step on the batch was dealt by which shares; [] if always evenly."""
    found: list[tuple[int, str]] = []
    for row, segment in rows:
        shares = segment.find_shares(row.step)
        if shares != (found[-1][1] if found else ""):
            found.append((row.step, shares))
    return found


def _load_orders(paths: dict[int, Path], segments: list[Segment]) -> tuple[dict[str, GivenOrder], list[LedgerDefect]]:
    """Return what samplers gave, by its key, and which files of it are missing or damaged."""
    folder, given, defects = next(iter(paths.values())).parent, {}, []
    for key in dict.fromkeys(key for segment in segments for key in segment.orders.values()):
        try:
            given[key] = load_given_order(folder, key)
        except UserError as error:
            defects.append(LedgerDefect("file", str(error)))
    return given, defects


def make_epoch_order(row: LedgerRow, segment: Segment, given: Mapping[str, GivenOrder]) -> EpochOrder:
    """Return the order of a row's epoch."""
    key = segment.orders.get(row.epoch, "")
    order = given.get(key)
    if order is not None and len(order.values) != segment.examples:
        order = None  # its ids differ, then
    return EpochOrder(segment.examples, segment.seed, row.epoch, segment.order_version, key, order)


def _find_file_defects(paths: dict[int, Path], segments: list[Segment]) -> list[LedgerDefect]:
    numbers = [number for number in range(1, max(paths)) if number not in paths]
    texts = [f"segment-{number:06}.csv is missing" for number in numbers]
    texts += [
        f"{segment.name}: line {line} is not a valid row" for segment in segments for line in segment.invalid_lines
    ]
    return [LedgerDefect("file", text) for text in texts]


def check_position(row: LedgerRow, segment: Segment, before: ReplayedStep | None) -> Iterator[LedgerDefect]:
    """Yield what is wrong with a row's step, epoch and offset, after the step before."""
    expected = before.row.step + 1 if before else 1
    if row.step > expected:
        gap = f"step {expected} is" if row.step == expected + 1 else f"steps {expected} to {row.step - 1} are"
        yield LedgerDefect("step", f"{gap} missing", row.step, row.epoch)
    elif row.step < expected:
        yield LedgerDefect("step", f"step {row.step} comes again after step {expected - 1}", row.step, row.epoch)
    if row.step < segment.first_step:
        text = f"step {row.step} is in {segment.name}, which begins with step {segment.first_step}"
        yield LedgerDefect("step", text, row.step, row.epoch)
    epoch, offset = 1, 0
    if before is not None:
        epoch, offset = before.row.epoch, before.end
        # What is owed may follow on the last example of an epoch.
        if offset == before.order.examples and not (row.step in segment.owed and row.epoch == epoch):
            epoch, offset = epoch + 1, 0
    if row.step in segment.made or (before is not None and before.made is not None):
        expected_epochs = (1,) if before is None else (before.row.epoch, before.row.epoch + 1)
        if row.epoch not in expected_epochs:
            text = f"step {row.step} is of epoch {row.epoch}, expected {expected_epochs[0]}"
            yield LedgerDefect("place", text, row.step, row.epoch)
    elif (row.epoch, row.offset) != (epoch, offset):
        text = f"step {row.step} begins at example {row.offset} of epoch {row.epoch}'s order"
        yield LedgerDefect("place", f"{text}, expected {offset} of epoch {epoch}", row.step, row.epoch)


def check_step_ids(
    row: LedgerRow, segment: Segment, order: EpochOrder, after: LedgerRow | None
) -> tuple[ReplayedStep, list[LedgerDefect]]:
    """Compare the ids that were fed with those that the row names.

    Args:
        row: of the step.
        segment: that the row is in.
        order: of its epoch.
        after: the next row, None for the last one.

    Returns:
        The step with what is known of its ids, and what is wrong with them.
    """
    if (made := segment.made.get(row.step)) is not None and row.epoch > 0:
        step = ReplayedStep(row, order, NO_IDS, NO_IDS, made.ranges, made)
        return step, list(check_made_version(step, segment.service))
    if row.step in segment.owed:
        return check_owed_ids(row, order, segment.owed[row.step])
    as_named = ReplayedStep(row, order, NO_IDS, NO_IDS, [])
    end = row.offset + row.fed
    if row.epoch < 1 or row.step < 1 or row.fed < 1 or row.offset >= segment.examples:
        text = f"step {row.step}: {row.fed} examples from {row.offset} of epoch {row.epoch}'s order"
        text += f", which has {segment.examples}, are impossible"
        return as_named, [LedgerDefect("ids", text, row.step, row.epoch)]
    planned = find_planned_end(row, segment, after)
    hashes_match = end <= segment.examples and order.sum_hashes(row.offset, end) == row.hash_sum
    if hashes_match and (after is not None or end == planned):  # else the next row shows whether the end is right
        return as_named, []
    explained = explain_mismatch(order.materialize(), row, planned)
    if explained is None:
        text = f"step {row.step} (epoch {row.epoch}): the {row.fed} ids that were fed are not those of the order"
        return as_named, [LedgerDefect("ids", f"{text}, and cannot be named", row.step, row.epoch)]
    # From here on the row has what it should have fed, so that the next one follows on it.
    step = ReplayedStep(row._replace(fed=planned - row.offset), order, *explained, [])
    return step, [describe_wrong_ids(step)]


def check_owed_ids(row: LedgerRow, order: EpochOrder, owed: Ranges) -> tuple[ReplayedStep, list[LedgerDefect]]:
    """Compare the ids that a step fed with the positions that were owed and that it was made of."""
    count, step = count_positions(owed), ReplayedStep(row, order, NO_IDS, NO_IDS, owed)
    is_possible = row.epoch > 0 and owed[-1][1] <= order.examples
    if is_possible and (row.fed, row.hash_sum) == (count, sum(order.sum_hashes(*pair) for pair in owed)):
        return step, []
    text = f"step {row.step} (epoch {row.epoch}): the {row.fed} ids that were fed are not the {count} that were owed"
    return step, [LedgerDefect("ids", text, row.step, row.epoch)]


def describe_wrong_ids(step: ReplayedStep) -> LedgerDefect:
    """Return the defect of a step whose wrong ids are known."""
    row, missing, extra = step.row, step.missing, step.extra
    texts = [f"{format_ids(missing)} not fed"] if len(missing) else []
    texts += [f"{format_ids(extra)} fed {'instead' if texts else 'besides'}"] if len(extra) else []
    shown = (missing[:MAX_SHOWN].tolist(), extra[:MAX_SHOWN].tolist())
    return LedgerDefect("ids", f"step {row.step} (epoch {row.epoch}): {', '.join(texts)}", row.step, row.epoch, *shown)


def find_planned_end(row: LedgerRow, segment: Segment, after: LedgerRow | None) -> int:
    """Return the position at which a step should have ended: where the next one begins, or by the batch size."""
    if after is not None and after.step == row.step + 1:
        if (after.epoch, after.offset) == (row.epoch + 1, 0):
            return segment.examples
        if after.epoch == row.epoch and row.offset < after.offset <= segment.examples:
            return after.offset
    return min(row.offset + segment.batch, segment.examples)
