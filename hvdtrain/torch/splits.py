"""A recipe's splits, "train" and its evaluation sets: their examples and what loads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hvdtrain.recipe.framework import Split
from hvdtrain.recipe.order import Ids
from hvdtrain.recipe.step_options import DataOptions
from hvdtrain.torch.data import BatchDataset, BatchRequest
from hvdtrain.torch.loader import BatchLoader
from hvdtrain.torch.recipe import Recipe


class SplitLoaders:
    """Loads batches of a recipe's datasets, by `options.workers` processes each from `start` to `close`."""

    def __init__(self, recipe: Recipe, datasets: Mapping[Split, Any], options: DataOptions) -> None:
        self.seed, self.max_batch = options.seed, options.micro_batch or recipe.batch_size
        self.num_examples: dict[Split, int] = dict.fromkeys(("train", *recipe.evals), 0)
        self.loaders: dict[Split, BatchLoader] = {}
        for split, dataset in datasets.items():
            self.num_examples[split] = len(dataset)
            self.loaders[split] = BatchLoader(BatchDataset(recipe, split, dataset), options.workers)

    def check_splits(self) -> None:
        """Load some examples of each split. Raises UserError, RecipeError: see Examples.look_at."""
        for loader in self.loaders.values():
            loader.examples.check_examples([self.seed, 0], self.max_batch, passed_on=loader.num_workers > 0)

    def load_first_batch(self, most: int) -> Any:
        """Return the first training examples, `most` or as many as there are, as one batch, loaded in this process."""
        ids = np.arange(min(most, self.num_examples["train"]), dtype=np.int64)
        return self.loaders["train"].examples.load_batch(BatchRequest(ids, (self.seed, 0)))[1]

    def load_batches(self, split: Split, parts: Iterable[Ids], epoch: int) -> Iterator[tuple[Ids, Any]]:
        """Return the batches of these ids, in order, each with the ids that were loaded."""
        return self.loaders[split].load_batches(parts, [self.seed, epoch])

    def start_workers(self) -> None:
        """Fork the loader processes, after what they are to find in memory is there."""
        for loader in self.loaders.values():
            loader.start_workers()

    def close(self) -> None:
        """End the loader processes."""
        for loader in self.loaders.values():
            loader.close()
