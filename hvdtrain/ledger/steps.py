"""A ledger's steps as they are replayed, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hvdtrain.ledger.epoch_order import EpochOrder
from hvdtrain.ledger.explain import NO_IDS
from hvdtrain.ledger.made import MadeVersion
from hvdtrain.ledger.rows import LedgerRow
from hvdtrain.recipe.order import Ids
from hvdtrain.recipe.ranges import Ranges

MAX_SHOWN = 10  # ids and defects that are shown, of however many there are


@dataclass(frozen=True)
class LedgerDefect:
    """Something in a ledger that is wrong."""

    kind: str  # file, step, place, ids, owed or epoch
    text: str
    step: int | None = None
    epoch: int | None = None
    missing: list[int] = field(default_factory=list)  # ids, MAX_SHOWN at most
    repeated: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ReplayedStep:
    """A row, and the ids that its step fed to the model, as far as they are known."""

    row: LedgerRow
    order: EpochOrder
    missing: Ids  # of those that the row names, these were not fed
    extra: Ids  # besides those that the row names, these were fed
    owed: Ranges  # what the step was made of, if that was owed; []: of the next positions
    made: MadeVersion | None = None  # by a parameter server; `owed` has its positions

    @property
    def end(self) -> int:
        """The position at which the order continues."""
        return self.row.offset + (0 if self.owed else self.row.fed)


def list_epoch_ids(step: ReplayedStep) -> Ids:
    """Return the order of a step's epoch, (examples,) int64; no ids if there is no such epoch."""
    return step.order.materialize().ids if step.row.epoch > 0 else NO_IDS


def list_ids_of(step: ReplayedStep, ranges: Ranges) -> Ids:
    """Return the ids at positions of the order of a step's epoch."""
    ids = list_epoch_ids(step)
    return np.concatenate([NO_IDS, *(ids[begin:end] for begin, end in ranges)])


def list_row_ids(step: ReplayedStep) -> Ids:
    """Return the ids that a row names."""
    return list_ids_of(step, step.owed or [[step.row.offset, step.end]])


def format_ids(ids: Ids) -> str:
    """Return ids as text; of many, the first few."""
    more = f" and {len(ids) - MAX_SHOWN} more" if len(ids) > MAX_SHOWN else ""
    return f"id{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:MAX_SHOWN]))}{more}"
