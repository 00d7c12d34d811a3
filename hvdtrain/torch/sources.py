"""Batches of examples that have no numbers: played by the model, or read from a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.comm.world import World
from hvdtrain.data.rollouts import Rollouts
from hvdtrain.data.stream import Stream
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.recipe.framework import DataSource, Split
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.data import NUM_CHECKED_EXAMPLES, BatchDataset, BatchRequest, seed_all, seed_cpu_generators

ROLLOUT_SEED = -3  # so that playing draws other numbers than the model does for the same example of the step


class RolloutBatches(BatchDataset):
    """Batches of examples that the model plays: see `hvdtrain.data.Rollouts`."""

    dataset: Rollouts

    def load_examples(self, request: BatchRequest) -> list[Any]:
        if request.now is None:
            raise RunError(f"{self._name_call()} plays its examples, which needs a training")
        now, seed = request.now, request.entropy[0]
        examples = []
        for i in range(request.first_index, request.first_index + len(request.ids)):
            seed_all([seed, now.step, i, ROLLOUT_SEED] if now.training else [seed, i, ROLLOUT_SEED])
            with in_recipe(self.recipe, f"dataset({self.split!r}).play(now, {i})"):
                example = self.dataset.play(now, i)
            if example is None:
                raise RunError(f"{name_call(self.recipe, f'dataset({self.split!r}).play(now, {i})')} is None")
            examples.append(example)
        return examples

    def list_compared_ids(self) -> list[int]:
        return []  # there is no model yet

    def check_examples(self, entropy: Sequence[int], most: int, *, passed_on: bool) -> None:
        """Refuse loader processes; examples are checked by the trial, as they need the model."""
        if passed_on:
            raise UserError(
                f"{self._name_call()} is a Rollouts, whose examples are made by the model in the training process: "
                "leave out --workers"
            )


class StreamBatches(BatchDataset):
    """Batches of a stream's examples: see `hvdtrain.data.Stream`."""

    dataset: Stream

    def __len__(self) -> int:
        return self.dataset.epoch_examples

    def load_examples(self, request: BatchRequest) -> list[Any]:
        return self._read(int(request.ids[0]), len(request.ids), request.entropy[0])

    def _read(self, first: int, count: int, seed: int) -> list[Any]:
        with in_recipe(self.recipe, self._name_factory()):
            examples = self.dataset.read_examples(first, count, lambda number: seed_cpu_generators([seed, number]))
        if any(example is None for example in examples):
            raise RunError(f"{name_call(self.recipe, self._name_factory())} gave None; expected examples")
        return examples

    def load_example(self, i: int, entropy: Sequence[int]) -> Any:
        return self._read(i, 1, entropy[0])[0]

    def list_compared_ids(self) -> list[int]:
        return [] if self.dataset.is_divided else [0]

    def check_examples(self, entropy: Sequence[int], most: int, *, passed_on: bool) -> None:
        """Read the first few examples, and join them. Raises UserError, RecipeError."""
        count = min(NUM_CHECKED_EXAMPLES, most)
        try:
            batch = self._collate_examples(range(count), self._read(0, count, entropy[0]))
            if passed_on:
                self._check_picklable(batch)
        except RunError as error:
            raise UserError(str(error)) from error

    def _name_factory(self) -> str:
        return f"dataset({self.split!r}).factory()"


def make_batches(recipe: DatasetRecipe, split: Split, dataset: Any) -> BatchDataset:
    """Return the batches of a split's dataset."""
    if isinstance(dataset, Rollouts):
        return RolloutBatches(recipe, split, dataset)
    if isinstance(dataset, Stream):
        return StreamBatches(recipe, split, dataset)
    return BatchDataset(recipe, split, dataset)


def find_source(recipe: DatasetRecipe, dataset: Any, world: World) -> DataSource:
    """Return where the examples of a training dataset come from; of a divided stream, this rank's part is set.

    Raises UserError for a sampler of what has no numbers.
    """
    if is_overridden(recipe, "sampler") and isinstance(dataset, (Stream, Rollouts)):
        raise UserError(
            f"{type(recipe).__name__} has a sampler and a {type(dataset).__name__}, whose examples have no numbers to "
            "give an order of: leave out one of them"
        )
    if isinstance(dataset, Stream):
        dataset.assign_part(world.data_rank, world.data_size)
        return DataSource.DIVIDED_STREAM if dataset.is_divided else DataSource.STREAM
    return DataSource.ROLLOUTS if isinstance(dataset, Rollouts) else DataSource.NUMBERED
