"""A recipe's splits, "train" and its evaluation sets: their examples and what loads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hvdtrain.comm.world import World
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.recipe.framework import Chunk, Split
from hvdtrain.recipe.given_order import GivenOrder
from hvdtrain.recipe.order import Ids
from hvdtrain.recipe.step_options import DataOptions
from hvdtrain.torch.data import BatchRequest
from hvdtrain.torch.loader import BatchLoader
from hvdtrain.torch.sampling import draw_order
from hvdtrain.torch.sources import find_source, make_batches


class SplitLoaders:
    """Loads batches of a recipe's datasets, by `options.workers` processes each from `start` to `close`."""

    def __init__(
        self, recipe: DatasetRecipe, datasets: Mapping[Split, Any], options: DataOptions, world: World
    ) -> None:
        self.datasets = datasets
        self.recipe, self.has_sampler = recipe, is_overridden(recipe, "sampler")
        self.source = find_source(recipe, datasets["train"], world)
        self.seed, self.max_batch = options.seed, options.micro_batch or recipe.batch_size
        self.num_examples: dict[Split, int] = dict.fromkeys(("train", *recipe.evals), 0)
        self.loaders: dict[Split, BatchLoader] = {}
        for split, dataset in datasets.items():
            batches = make_batches(recipe, split, dataset)
            self.num_examples[split] = len(batches)
            self.loaders[split] = BatchLoader(batches, options.workers)

    def check_splits(self) -> None:
        """Load some examples of each split. Raises UserError, RecipeError: see BatchDataset.check_examples."""
        for loader in self.loaders.values():
            loader.examples.check_examples([self.seed, 0], self.max_batch, passed_on=loader.num_workers > 0)

    def load_first_batch(self, most: int, split: Split = "train") -> Any:
        """Return a split's first examples, `most` or as many as there are, as one batch, loaded in this process."""
        ids = np.arange(min(most, self.num_examples[split]), dtype=np.int64)
        return self.loaders[split].examples.load_batch(BatchRequest(ids, (self.seed, 0), self.recipe.now))[1]

    def draw_order(self, seed: int, epoch: int) -> GivenOrder | None:
        """Return what the recipe's sampler gives for an epoch of training; None for a shuffled one."""
        return draw_order(self.recipe, self.num_examples["train"], seed, epoch)

    def load_batches(self, split: Split, chunks: Iterable[Chunk], epoch: int) -> Iterator[tuple[Ids, Any]]:
        """Return the batches of these chunks, in order, each with the ids that were loaded."""
        entropy = (self.seed, epoch)
        requests = (BatchRequest(c.ids, entropy, c.now, c.first_index, c.first_place) for c in chunks)
        return self.loaders[split].load_requests(requests)

    def start_workers(self) -> None:
        """Fork the loader processes, after what they are to find in memory is there."""
        for loader in self.loaders.values():
            loader.start_workers()

    def close(self) -> None:
        """End the loader processes."""
        for loader in self.loaders.values():
            loader.close()
