"""The recipe for torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.recipe.options import option

# Scores by name, each values or (numerators, denominators); or a pair of them and of outputs by name.
ScoreResult: TypeAlias = (
    Mapping[str, Tensor | tuple[Tensor, Tensor]]
    | tuple[Mapping[str, Tensor | tuple[Tensor, Tensor]], Mapping[str, Tensor | NDArray[Any]]]
)


@dataclass(kw_only=True)
class Recipe(DatasetRecipe):
    """A torch recipe: subclass it with `@dataclass(kw_only=True)` and write four methods.

    `score` must return one value per example, never a mean: that is what makes weighting, accumulation and metrics
    exact. `dataset` returns map-style datasets, not loaders: hvdtrain shards them, and `collate` makes batches of their
    examples. Random transformations of an example are drawn from torch's, numpy's or Python's global generator, which
    hvdtrain seeds by (seed, epoch, example), in evaluations by (seed, example); in the order of a `sampler` by the
    example's place, too.
    """

    framework: ClassVar[str] = "torch"
    stack_examples: ClassVar[Callable[[list[Any]], Any]] = staticmethod(default_collate)

    channels_last: bool = option(False, "keep images and convolutions in channels-last memory format")

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """Return the model, with its initial weights."""
        raise NotImplementedError

    @abstractmethod
    def optimizer(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer | dict[str, torch.optim.Optimizer]:
        """Return the optimizer of the model's parameters, at learning rate `self.lr`.

        Declared as `optimizer(self, params, named)`, it is also given a list of (name, parameter).

        For several losses, return a dict of optimizers by the names of their scores, such as {"loss_d": ..., "loss_g":
        ...}, with no parameter in two of them. Each loss is differentiated with respect to its own optimizer's
        parameters only, clipped and scheduled alone; the column "loss" is their sum. A training step may leave losses
        out, on all ranks alike, as by `self.now.step % 2`: their optimizers are not stepped. Evaluations have all.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, model: torch.nn.Module, batch: Any) -> ScoreResult:
        """Return the scores of a batch of B examples: {"loss": (B,), ...}; what is not the loss is a metric.

        A score may be a pair (numerators, denominators), both (B,): its value is sum / sum over all examples and ranks,
        also of the loss. {"loss": (nll.sum(1), mask.sum(1))} is the mean over tokens. Gradients are of the numerators;
        a step whose denominators of the loss add up to 0 changes nothing. A metric may also be (B, k), alone or with
        denominators (B, k) or (B,): k values at once, such as the counts of a histogram. See `metrics`.

        It may return a pair of dicts (scores, outputs), which saves the second pass of `outputs`.
        """
        raise NotImplementedError

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """Return the blocks of the model, such as its layers: modules of it, none of them in another.

        --recompute runs them again in the backward pass; they change no input and no buffer. --shard model gathers the
        parameters of one after the other.
        """
        raise NotImplementedError

    def split_plan(self) -> Mapping[str, object]:
        """Return how --tensor splits layers: `torch.distributed.tensor.parallel`'s ParallelStyle by names of modules.

        As for parallelize_module: {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}. What is
        not named stays whole on each rank. Import torch.distributed.tensor.parallel in the method.
        """
        raise NotImplementedError

    def stages(self, model: torch.nn.Module) -> Sequence[str]:
        """Return the names of the modules after which --stages cuts the model, such as ["layers.3", "layers.7"].

        In order, one fewer than there are stages: --stages, or twice that with interleaved and zerobubble. Without this
        method the model is cut so that its stages take about as long.
        """
        raise NotImplementedError

    def tables(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """Return the embedding tables of the model, of which each rank is to hold some rows only.

        They are nn.Embedding or nn.EmbeddingBag, used by calling them, or several at once by `hvdtrain.torch.lookup`.
        On one rank and with --tables whole they stay as they are; the training is the same. In elastic runs each row is
        on two ranks.
        """
        raise NotImplementedError
