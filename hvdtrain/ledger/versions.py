"""Checking a ledger of a run with a parameter server: was each item applied exactly once, and none too old?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.ledger.made import MadeVersion, RecordedService
from hvdtrain.ledger.steps import MAX_SHOWN, LedgerDefect, ReplayedStep, format_ids, list_ids_of
from hvdtrain.recipe.ranges import Ranges, count_positions, join_ranges, subtract_ranges
from hvdtrain.system.text import format_count


def check_made_version(step: ReplayedStep, service: RecordedService | None) -> Iterator[LedgerDefect]:
    """Yield what is wrong with a version: its items, their age, or the ids that were fed."""
    row, made = step.row, step.made
    assert made is not None
    examples, where = step.order.examples, f"step {row.step} (epoch {row.epoch})"
    count = sum(item.end - item.begin for item in made.items)
    for item in made.items:
        if not item.begin < item.end <= examples:
            text = f"{where}: an item of positions {item.begin} to {item.end} of {examples} is impossible"
            yield LedgerDefect("ids", text, row.step, row.epoch)
            return
        age, bound = row.step - 1 - item.read, None
        if service is not None:
            bound = service.policy.find_bound(service.workers)
        if age < 0 or (bound is not None and age > bound):
            expected = "of a version before" if age < 0 else f"at most {bound} versions old"
            text = f"{where}: an item was computed with the weights after step {item.read}, expected {expected}"
            yield LedgerDefect("place", text, row.step, row.epoch)
    hashes = sum(step.order.sum_hashes(item.begin, item.end) for item in made.items)
    if (row.fed, row.hash_sum) != (count, hashes):
        text = f"{where}: the {row.fed} ids that were fed are not the {count} of its items"
        yield LedgerDefect("ids", text, row.step, row.epoch)


def list_positions(step: ReplayedStep) -> Ranges:
    """Return the positions of the order that a step was made of."""
    return step.owed or [[step.row.offset, step.end]]


def check_items_once(epoch: int, steps: Sequence[ReplayedStep], is_complete: bool) -> Iterator[LedgerDefect]:
    """Yield which ids of an epoch were applied several times, or, if it is complete, never."""
    covered: Ranges = []
    for step in steps:
        items = [[item.begin, item.end] for item in step.made.items] if step.made else list_positions(step)
        for pair in items:
            if again := subtract_ranges([pair], subtract_ranges([pair], covered)):
                ids = list_ids_of(step, again)
                text = f"epoch {epoch}: {format_ids(ids)} applied again in step {step.row.step}"
                yield LedgerDefect("epoch", text, step.row.step, epoch, [], ids[:MAX_SHOWN].tolist())
            covered = join_ranges(covered, [pair])
    missing = subtract_ranges([[0, steps[-1].order.examples]], covered)
    if is_complete and missing:
        ids = list_ids_of(steps[-1], missing)
        text = f"epoch {epoch}: {format_ids(ids)} never applied"
        yield LedgerDefect("epoch", text, None, epoch, ids[:MAX_SHOWN].tolist(), [])


def count_rest(steps: Sequence[ReplayedStep]) -> int:
    """Return how many examples of its last epoch a ledger has applied; 0 if it is complete."""
    applied = join_ranges(*(list_positions(step) for step in steps))
    return count_positions(applied) % steps[-1].order.examples


@dataclass(frozen=True)
class AppliedAges:
    """How old the items were that a parameter server applied, in versions."""

    mean: float
    most: int

    def describe(self) -> str:
        """Return it as a line of text."""
        return f"staleness: mean {self.mean:.2f}, at most {format_count(self.most, 'version')}"


def measure_ages(made: Mapping[int, MadeVersion]) -> AppliedAges | None:
    """Return how old the items of versions were; None if there are none. made: by step."""
    ages = [step - 1 - item.read for step, version in made.items() for item in version.items]
    return AppliedAges(sum(ages) / len(ages), max(ages)) if ages else None
