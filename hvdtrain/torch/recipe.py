"""The recipe for torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hvdtrain import recipe
from hvdtrain.recipe import option


@dataclass(kw_only=True)
class Recipe(recipe.Recipe):
    """A torch recipe: subclass it with `@dataclass(kw_only=True)` and write four methods.

    `score` must return one value per example, never a mean: that is what makes weighting, accumulation and metrics
    exact. `dataset` returns map-style datasets, not loaders: hvdtrain shards them. Random transformations of an example
    are drawn from torch's, numpy's or Python's global generator, which hvdtrain seeds by (seed, epoch, example).
    """

    framework: ClassVar[str] = "torch"

    channels_last: bool = option(False, "keep images and convolutions in channels-last memory format")

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """The model, with its initial weights."""
        raise NotImplementedError

    @abstractmethod
    def dataset(self, split: Literal["train", "eval"]) -> Any:
        """The examples of a split: an object with len() and [i]."""
        raise NotImplementedError

    @abstractmethod
    def optimizer(self, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, at learning rate `self.lr`."""
        raise NotImplementedError

    @abstractmethod
    def score(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """The scores of a batch of B examples: {"loss": (B,), ...}; what is not the loss is a metric."""
        raise NotImplementedError
