"""How often an epoch visited each id, by what the steps are known to have fed and what was lost of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from hvdtrain.ledger.owed import describe_unsettled, replay_losses
from hvdtrain.ledger.steps import (
    MAX_SHOWN,
    LedgerDefect,
    ReplayedStep,
    format_ids,
    list_epoch_ids,
    list_ids_of,
    list_row_ids,
)
from hvdtrain.ledger.versions import check_items_once
from hvdtrain.recipe.ranges import Ranges, subtract_ranges


def check_epoch(
    epoch: int, steps: list[ReplayedStep], losses: Mapping[int, Ranges], is_complete: bool
) -> Iterator[LedgerDefect]:
    """Yield which ids an epoch did not visit, or visited several times; of an incomplete one, up to its last step.

    losses: what was lost again, by the step after which.
    """
    if any(step.made is not None for step in steps):
        yield from check_items_once(epoch, steps, is_complete)
        return
    defects: list[LedgerDefect] = []
    pending = replay_losses(steps, losses, defects)
    if is_complete and pending:
        defects.append(describe_unsettled(epoch, steps[-1], pending))
    yield from defects
    reach = steps[-1].order.examples if is_complete else max(step.end for step in steps)
    if is_covered_once(steps, reach):
        return
    due = list_ids_of(steps[-1], subtract_ranges([[0, reach]], pending))
    fed = [ids for step in steps for ids in (list_row_ids(step), step.extra)]
    count = 1 + max((int(ids.max()) for ids in (due, *fed) if len(ids)), default=0)
    visits = np.bincount(np.concatenate(fed), minlength=count)
    lost = [list_ids_of(step, losses.get(step.row.step, [])) for step in steps]
    visits -= np.bincount(np.concatenate([*lost, *(step.missing for step in steps)]), minlength=count)
    times_due = np.bincount(due, minlength=count)  # 0 or 1, but for orders that a sampler gave
    missing, repeated = np.flatnonzero(visits < times_due), np.flatnonzero(visits > np.maximum(times_due, 1))
    texts = []
    if len(missing):
        place = describe_place(int(np.flatnonzero(list_epoch_ids(steps[-1]) == missing[0])[0]), steps)
        texts.append(f"{format_ids(missing)} not visited (id {missing[0]} was due {place})")
    if len(repeated):
        first = repeated[0]
        again = [str(step.row.step) for step in steps if first in list_row_ids(step) or first in step.extra]
        steps_of = f"step{'s' * (len(again) > 1)} {', '.join(again[:MAX_SHOWN])}"
        texts.append(f"{format_ids(repeated)} visited again (id {first} in {steps_of})")
    if texts:
        shown = (missing[:MAX_SHOWN].tolist(), repeated[:MAX_SHOWN].tolist())
        yield LedgerDefect("epoch", f"epoch {epoch}: {'; '.join(texts)}", None, epoch, *shown)


def describe_place(position: int, steps: list[ReplayedStep]) -> str:
    """Return in or after which step a position of the order was due."""
    earlier = [step.row for step in steps if step.row.offset <= position and not step.owed]
    if not earlier:
        return "before the first step"
    row = max(earlier, key=lambda row: row.offset)
    return f"{'in' if position < row.offset + row.fed else 'after'} step {row.step}"


def is_covered_once(steps: list[ReplayedStep], reach: int) -> bool:
    """Whether the steps fed what they name, all of one order, and name its first `reach` positions once each.

    But for what was owed, which `replay_losses` follows.
    """
    position = 0
    for step in steps:
        if step.order != steps[0].order or step.row.epoch < 1 or step.row.offset != position:
            return False
        if len(step.missing) or len(step.extra):
            return False
        position = step.end
    return position == reach <= steps[0].order.examples
