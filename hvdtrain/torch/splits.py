"""A recipe's splits, "train" and "eval": their examples and what loads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hvdtrain.recipe.framework import Ids, Split, StepOptions
from hvdtrain.torch.data import Examples, Request
from hvdtrain.torch.loader import Loader
from hvdtrain.torch.recipe import Recipe


class Splits:
    """Loads batches of a recipe's datasets, by `options.workers` processes each from `start` to `close`."""

    def __init__(self, recipe: Recipe, datasets: Mapping[Split, Any], options: StepOptions) -> None:
        self.seed, self.most = options.seed, options.micro_batch or recipe.batch_size
        self.examples: dict[Split, int] = {"train": 0, "eval": 0}
        self.loaders: dict[Split, Loader] = {}
        for split, dataset in datasets.items():
            self.examples[split] = len(dataset)
            self.loaders[split] = Loader(Examples(recipe, split, dataset), options.workers)

    def look_at(self) -> None:
        """Load some examples of each split. Raises UserError, RecipeError: see Examples.look_at."""
        for loader in self.loaders.values():
            loader.examples.look_at([self.seed, 0], self.most, passed_on=loader.workers > 0)

    def first_batch(self, most: int) -> Any:
        """The first training examples, `most` or as many as there are, as one batch, loaded in this process."""
        ids = np.arange(min(most, self.examples["train"]), dtype=np.int64)
        return self.loaders["train"].examples.load(Request(ids, (self.seed, 0)))[1]

    def load(self, split: Split, parts: Iterable[Ids], epoch: int) -> Iterator[tuple[Ids, Any]]:
        """The batches of these ids, in order, each with the ids that were loaded."""
        return self.loaders[split].batches(parts, [self.seed, epoch])

    def start(self) -> None:
        """Fork the loader processes, after what they are to find in memory is there."""
        for loader in self.loaders.values():
            loader.start()

    def close(self) -> None:
        """End the loader processes."""
        for loader in self.loaders.values():
            loader.close()
