"""The order of each epoch's examples: shuffled, or as the recipe's `sampler` gives it.

epoch begins            rank 0 calls the sampler; what it gives is broadcast, and kept in the ledger
a rank is lost, joins   the ranks take the order of the epoch from the rank that is farthest, with its ledger
resume in mid-epoch     rank 0 reads it from the ledger by the key in the checkpoint; without a ledger it calls the
sampler again, which must give the same
"""

from __future__ import annotations

from pathlib import Path

from hvdtrain.comm import collectives
from hvdtrain.ledger.reader import load_given_order
from hvdtrain.ledger.rows import order_path
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.framework import Step
from hvdtrain.recipe.given_order import GivenOrder, ListedOrder, decode_orders, encode_orders
from hvdtrain.recipe.order import Order, SampleOrder, StreamOrder
from hvdtrain.system.errors import UserError
from hvdtrain.training.position import Position
from hvdtrain.training.streams import SOURCE_TEXTS, is_stream


class EpochOrders:
    """The orders of a generation's epochs; all ranks call its methods at the same positions.

    Attributes:
        order: of the present epoch.
        given: what the recipe's sampler has given for it; None: it is shuffled.
    """

    def __init__(
        self, step: Step, recipe: str, seed: int, folder: Path, position: Position, known: Ledger | None
    ) -> None:
        """Find or draw the order of the epoch in which `position` is.

        Args:
            step: calls the recipe's sampler.
            recipe: its name.
            seed: of the run.
            folder: the run folder.
            position: where the generation begins; its length and key of the order are set.
            known: what was recorded in an earlier generation.

        Raises:
            UserError, RecipeError: on all ranks, for a sampler's order that is not valid, or another one than before.
        """
        self._step, self._recipe, self._seed, self._ledger_folder = step, recipe, seed, folder / "ledger"
        self._epoch = position.epoch
        in_memory = known.orders.get(position.epoch + 1) if known is not None else None
        if not position.offset:
            self.given = self._draw(position.epoch)
        elif not position.order:
            self.given = None
        elif in_memory is not None and in_memory.key == position.order:
            self.given = in_memory
        else:
            self.given = self._find_again(position)
        self.order = self._make_order(position)
        position.examples = self.order.examples

    def begin_epoch(self, position: Position, ledger: Ledger) -> Order:
        """Return the order of the epoch in which `position` is, and give it to the ledger.

        Raises UserError on all ranks if it has another length than the epoch before.
        """
        if position.epoch != self._epoch:
            self._epoch, self.given = position.epoch, self._draw(position.epoch)
            self.order = self._make_order(position)
            if self.order.examples != position.examples:
                raise UserError(
                    f"{self._recipe}.sampler('train', {position.epoch}) gives {self.order.examples} "
                    f"examples, the epochs before had {position.examples}; give equally many in each epoch"
                )
        ledger.begin_epoch(position.epoch + 1, self.given)
        return self.order

    def _draw(self, epoch: int) -> GivenOrder | None:
        if not self._step.has_sampler:
            return None
        drawn = None

        def draw_on_root() -> bool:
            nonlocal drawn
            drawn = self._step.draw_order(self._seed, epoch)
            return drawn is not None

        return share_order(drawn) if collectives.on_root("sampler", draw_on_root) else None

    def _find_again(self, position: Position) -> GivenOrder:
        """Return the order of an epoch that a checkpoint is in the middle of."""
        found = None

        def find_on_root() -> None:
            nonlocal found
            if order_path(self._ledger_folder, position.order).exists():
                found = load_given_order(self._ledger_folder, position.order)
            elif self._step.has_sampler:
                found = self._step.draw_order(self._seed, position.epoch)
            if found is None or found.key != position.order:
                raise UserError(
                    f"cannot resume at example {position.offset} of an epoch: {self._recipe}.sampler "
                    "gives another order now, and the ledger does not have the one of then; resume from a checkpoint "
                    "at the end of an epoch, or with the original data and sampler"
                )
            count = self._step.examples["train"]
            most = len(found.values) if found.kind == "weights" else int(found.values.max()) + 1
            if most > count or (found.kind == "weights" and most != count):
                raise UserError(
                    f"cannot resume at example {position.offset} of an epoch whose order is of {most} examples: the "
                    f"data has {count} now; use the original data"
                )

        collectives.on_root("sampler.again", find_on_root)
        return share_order(found)

    def _make_order(self, position: Position) -> Order:
        position.order = self.given.key if self.given is not None else ""
        if self.given is not None:
            return ListedOrder(self.given.list_ids(self._seed, position.epoch))
        if is_stream(self._step.source):
            return StreamOrder(self._step.examples["train"], position.samples - position.offset)
        return SampleOrder(self._step.examples["train"], self._seed, position.epoch)

    @property
    def may_repeat(self) -> bool:
        """Whether an epoch may have an id several times."""
        return self.given is not None

    def describe(self) -> str:
        """Return in a few words where the order comes from; "" for a shuffled dataset."""
        if self.given is None:
            return SOURCE_TEXTS[self._step.source]
        count = self._step.examples["train"]
        if self.given.kind == "weights":
            return f"drawn by the sampler's weights from {count}"
        return f"in the sampler's order, from {count}"


def share_order(given: GivenOrder | None) -> GivenOrder:
    """Return rank 0's order on all ranks."""
    data = encode_orders({0: given}) if given is not None else None
    return decode_orders(collectives.broadcast_bytes(data, "sampler.order"))[0]
