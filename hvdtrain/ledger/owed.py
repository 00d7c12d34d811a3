"""What a ledger says was lost with a rank in a round of local steps, and was trained again by the others.

after step 40    # lost 40 128-192,256-320    these positions, consumed so far, are pending
step 41          # owed 41 128-192            its row has the hashes of these, and they are pending no more
the epoch ends   nothing is pending
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hvdtrain.ledger.steps import MAX_SHOWN, LedgerDefect, ReplayedStep, format_ids, list_ids_of
from hvdtrain.recipe.ranges import Ranges, count_positions, join_ranges, subtract_ranges
from hvdtrain.system.text import format_count


def replay_losses(steps: Sequence[ReplayedStep], losses: Mapping[int, Ranges], defects: list[LedgerDefect]) -> Ranges:
    """Return what is pending after some steps of an epoch, in their order.

    Args:
        steps: from the first one of the epoch on.
        losses: by the step after which it was lost.
        defects: those that are found are added to it.
    """
    pending: Ranges = []
    for step in steps:
        if strange := subtract_ranges(step.owed, pending):
            count = format_count(count_positions(strange), "example")
            text = f"step {step.row.step} is made of {count} not owed"
            defects.append(LedgerDefect("owed", text, step.row.step, step.row.epoch))
        pending = subtract_ranges(pending, step.owed)
        lost = losses.get(step.row.step, [])
        if strange := subtract_ranges(lost, subtract_ranges([[0, step.end]], pending)):
            count = format_count(count_positions(strange), "example")
            text = f"after step {step.row.step}, {count} lost that nobody had trained"
            defects.append(LedgerDefect("owed", text, step.row.step, step.row.epoch))
        pending = join_ranges(pending, lost)
    return pending


def find_unknown_losses(steps: Sequence[ReplayedStep], losses: Mapping[int, Ranges]) -> Iterator[LedgerDefect]:
    """Yield a defect for each loss after a step that is not there."""
    known = {step.row.step for step in steps}
    for step in sorted(losses.keys() - known):
        yield LedgerDefect("owed", f"examples are lost after step {step}, which is missing", step)


def describe_unsettled(epoch: int, step: ReplayedStep, pending: Ranges) -> LedgerDefect:
    """Return the defect of a complete epoch in which something that was lost was not trained again.

    step: some step of it.
    """
    missing = list_ids_of(step, pending)
    text = f"epoch {epoch}: {format_ids(missing)} not visited (lost with a rank, and not trained again)"
    return LedgerDefect("epoch", text, None, epoch, missing[:MAX_SHOWN].tolist())
