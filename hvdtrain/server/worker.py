"""A worker of a parameter server: it gets items and weights, and sends gradients until the run ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdtrain.comm.messages import Messages
from hvdtrain.ledger.rows import sum_id_hashes
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.framework import Chunk, StepVotes
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.order import SampleOrder, split_micro_batches
from hvdtrain.server.items import Bytes, Item, ItemContext
from hvdtrain.server.roles import decode_failure, encode_failure
from hvdtrain.server.served_step import ServedStep
from hvdtrain.system import activity
from hvdtrain.system.errors import KnownError

SERVER = 0  # the rank of the dispatcher


@dataclass(frozen=True)
class ItemResult:
    """What a worker reports of an item, next to its gradient: the mean over its examples."""

    sums: list[float]  # of the scores
    is_finite: bool  # whether the losses are
    examples: int  # ids fed to the model
    id_hashes: int  # the sum of their 32-bit hashes
    stop: bool = False  # this rank was asked to stop the run


class ItemComputer:
    """Computes gradients of items, as a step of a plain run would that has them.

    Attributes:
        step: of this process, which is alone in its world.
        items_done: how many it has computed.
        parts: the parameters of each server, by their places.
    """

    def __init__(
        self,
        recipe: Recipe,
        step: ServedStep,
        context: ItemContext,
        folder: Path,
        parts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.parts = parts
        self.recipe, self.step, self.context, self._folder = recipe, step, context, folder
        self.items_done = 0
        self._order: tuple[int, SampleOrder] | None = None  # of an epoch

    def compute_gradient(self, epoch: int, item: Item, stop: bool = False) -> ItemResult:
        """Compute the gradient of an item of an epoch (from 0) with the step's weights; `read_gradients` follows."""
        context, place = self.context, self.context.find_place(epoch, item)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, SampleOrder(context.examples, context.seed, epoch)
        passes = split_micro_batches(self._order[1].ids_between(*item), context.micro_batch)
        now = Now(
            folder=self._folder,
            rank=0,
            size=1,
            step=place.step,
            steps=context.total_steps,
            epoch=epoch,
            epochs=context.epochs,
            samples=place.samples,
            training=True,
        )
        set_now(self.recipe, now)
        index, chunks = place.first_index, []
        for ids in passes:
            chunks.append(Chunk(ids, now, index))
            index += len(ids)
        self.step.start_step([len(passes)], 1.0, False)
        fed = hashes = 0
        activity.enter_activity("loading its batch")
        for number, (ids, batch) in enumerate(self.step.load_batches("train", chunks, epoch)):
            activity.enter_activity("computing gradients")
            fed, hashes = fed + len(ids), hashes + sum_id_hashes(ids)
            if number == len(chunks) - 1:
                self.step.cast_votes(StepVotes(examples=fed))
            seed = (context.seed, place.step, chunks[number].first_index)
            self.step.accumulate_gradients(batch, len(ids), 1 / (item.end - item.begin), seed)
        self.items_done += 1
        result = self.step.all_reduce()
        return ItemResult(result.score_sums.tolist(), not result.nonfinite_loss, fed, hashes, stop)


def compute_items(
    computer_of: Callable[[ItemContext, int], ItemComputer], messages: Messages, stop: Callable[[], bool]
) -> Any:
    """Compute gradients for the server until the run has ended; return its summary.

    Args:
        computer_of: returns what computes the run's items, as the worker of this rank.
        messages: to and from all ranks.
        stop: returns whether this rank was asked to stop the run.

    Raises:
        UserError, RunError, RecipeError: of this worker, or with which the run has ended.
    """
    computer: ItemComputer | None = None
    weights: list[Bytes] = []  # of each server
    gradients: list[Bytes] = []
    while True:
        activity.enter_activity("waiting for an item", waits=True)
        _, (kind, *values) = messages.receive(weights[0] if weights else None, SERVER)
        if kind == "begin":
            computer = computer_of(ItemContext(**values[0]), values[1])
            weights, gradients = ([computer.step.make_array(own) for own in computer.parts] for _ in range(2))
            activity.begin_training(0)
        elif kind == "item":
            assert computer is not None
            epoch, begin, end = values
            for server in range(1, len(computer.parts)):
                messages.receive(weights[server], server)
            try:
                for own, array in zip(computer.parts, weights, strict=True):
                    computer.step.write_weights(array, own)
                result = computer.compute_gradient(epoch, Item(begin, end), stop())
                for own, array in zip(computer.parts, gradients, strict=True):
                    computer.step.read_gradients(array, own)
                computer.step.skip_update()
            except KnownError as error:
                messages.send(SERVER, ["failed", *encode_failure(error)])
                raise
            messages.send(SERVER, ["gradient", asdict(result)], gradients[0])
            for server in range(1, len(computer.parts)):
                messages.send(server, ["gradient"], gradients[server])
            activity.record_finished_steps(computer.items_done)
        elif kind == "failed":
            raise decode_failure(*values)
        else:
            return values[0]
