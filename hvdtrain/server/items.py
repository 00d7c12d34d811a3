"""Items: the examples of an epoch's order that a worker computes the gradient of at a time.

A global batch is cut into as many items as the ranks of a plain run would be dealt: hvdtrain.recipe.order.part_bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hvdtrain.recipe import order
from hvdtrain.recipe.ranges import Ranges, join_ranges, subtract_ranges


class Item(NamedTuple):
    """Positions [begin, end) of an epoch's order."""

    begin: int
    end: int


class ItemPlace(NamedTuple):
    """Where an item is in a run, as its gradient depends on it."""

    step: int  # of a plain run, that has it
    first_index: int  # in the global batch of that step
    samples: int  # consumed before that step


@dataclass(frozen=True)
class ItemContext:
    """What is the same for all items of a run; sent to the workers as JSON."""

    examples: int
    seed: int
    batch: int  # global, that items are cut from
    parts: int  # of a batch
    micro_batch: int  # most examples of a pass
    total_steps: int
    epochs: int

    @property
    def parts_per_batch(self) -> int:
        """How many items a whole batch has."""
        return min(self.parts, self.batch)

    def cut_items(self, pending: Ranges) -> Iterator[Item]:
        """Yield the items of what is left of an epoch, in their order; of one that is applied in part, the rest."""
        for begin, end in pending:
            for first in range(begin // self.batch * self.batch, end, self.batch):
                count = min(self.batch, self.examples - first)
                for part in range(self.parts):
                    start, stop = order.part_bounds(count, part, self.parts)
                    start, stop = max(begin, first + start), min(end, first + stop)
                    if start < stop:
                        yield Item(start, stop)

    def count_versions(self, pending: Ranges, per_version: int) -> int:
        """Return how many versions are made of what is left of an epoch."""
        return -(-sum(1 for _ in self.cut_items(pending)) // per_version)

    def find_place(self, epoch: int, item: Item) -> ItemPlace:
        """Return where an item of an epoch (from 0) is in the run."""
        number = item.begin // self.batch
        steps_per_epoch = -(-self.examples // self.batch)
        first = number * self.batch
        return ItemPlace(epoch * steps_per_epoch + number, item.begin - first, epoch * self.examples + first)


def find_pending(examples: int, offset: int, owed: Ranges) -> Ranges:
    """Return the positions of an epoch that are not applied: those that are owed, and those from `offset` on."""
    return join_ranges(owed, [[offset, examples]])


class EpochItems:
    """What of an epoch's order was handed out, and what was applied.

    Attributes:
        frontier: the position at which the order continues.
    """

    def __init__(self, context: ItemContext, offset: int, owed: Ranges) -> None:
        """Continue an epoch.

        Args:
            context: of the run.
            offset: the position at which the order continues.
            owed: positions before it that are not applied.
        """
        self.frontier = offset
        self._applied = subtract_ranges([[0, offset]], owed)
        pending = find_pending(context.examples, offset, owed)
        self._fresh = context.cut_items(pending)
        self._next: Item | None = next(self._fresh, None)
        self._returned: list[Item] = []
        self._left = sum(1 for _ in context.cut_items(pending))

    @property
    def left(self) -> int:
        """How many items are not applied."""
        return self._left

    @property
    def unapplied(self) -> Ranges:
        """Positions before the frontier that are not applied."""
        return subtract_ranges([[0, self.frontier]], self._applied)

    @property
    def is_queue_empty(self) -> bool:
        """Whether there is nothing to hand out."""
        return self._next is None and not self._returned

    def take(self) -> Item:
        """Hand out the first item of the queue."""
        if self._returned:
            return self._returned.pop(0)
        assert self._next is not None
        item, self._next = self._next, next(self._fresh, None)
        self.frontier = max(self.frontier, item.end)
        return item

    def give_back(self, items: list[Item]) -> None:
        """Put items that were handed out and not applied back to the front of the queue."""
        self._returned = sorted([*self._returned, *items])

    def apply(self, items: list[Item]) -> None:
        """Count items as applied."""
        self._applied = join_ranges(self._applied, [[item.begin, item.end] for item in items])
        self._left -= len(items)


Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]  # of weights or gradients, as they travel
