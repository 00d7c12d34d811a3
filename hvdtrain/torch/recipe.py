"""The recipe for torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from hvdtrain.recipe import base
from hvdtrain.recipe.options import option

# Scores by name, each values or (numerators, denominators); or a pair of them and of outputs by name.
ScoreResult: TypeAlias = (
    Mapping[str, Tensor | tuple[Tensor, Tensor]]
    | tuple[Mapping[str, Tensor | tuple[Tensor, Tensor]], Mapping[str, Tensor | NDArray[Any]]]
)


@dataclass(kw_only=True)
class Recipe(base.Recipe):
    """A torch recipe: subclass it with `@dataclass(kw_only=True)` and write four methods.

    `score` must return one value per example, never a mean: that is what makes weighting, accumulation and metrics
    exact. `dataset` returns map-style datasets, not loaders: hvdtrain shards them, and `collate` makes batches of their
    examples. Random transformations of an example are drawn from torch's, numpy's or Python's global generator, which
    hvdtrain seeds by (seed, epoch, example), in evaluations by (seed, example); in the order of a `sampler` by the
    example's place, too.
    """

    framework: ClassVar[str] = "torch"
    # How buffers that training changes are combined over ranks after each step, by name or pattern ("*.queue"):
    # "mean" (by the ranks' shares of the batch), "sum" (of the ranks' changes: counters), "rank0" or "local". What
    # torch's batch norm keeps needs no entry.
    buffers: ClassVar[dict[str, str]] = {}

    channels_last: bool = option(False, "keep images and convolutions in channels-last memory format")

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """Return the model, with its initial weights."""
        raise NotImplementedError

    @abstractmethod
    def dataset(self, split: str) -> Any:
        """Return the examples of a split: an object with len() and [i]; None for one that is not to be evaluated.

        It is called for "train", then for each name in `evals`, by default "eval", each time with torch's, numpy's and
        Python's global generators newly seeded from --seed: a random split (`random_split`, `train_test_split`) is the
        same each time.
        """
        raise NotImplementedError

    def sampler(self, split: str, epoch: int) -> Any:
        """Return the order of an epoch (from 0) of training; None, the default, for a shuffled one.

        A float tensor or array of len(dataset): weights, by which len(dataset) examples are drawn, with replacement.
        Integers, as a tensor, a list, or a torch Sampler: the ids of the epoch's examples in their order, as many as
        they are; an id may come several times, or not at all. All epochs of a run must have equally many.

        It is called with the split "train" only, on rank 0, whose order all ranks take, at the beginning of each epoch
        and where a run resumes, with torch's, numpy's and Python's global generators seeded by (seed, epoch). Before a
        run's first step `now.steps` and `now.epochs` are not known. An evaluation scores each of its examples once: let
        `dataset` return the examples to evaluate.
        """
        return None

    def collate(self, examples: list[Any]) -> Any:
        """Return the batch of some examples, for `score`; by default torch's `default_collate` stacks their tensors.

        Override it to pad examples of different sizes, or to join objects of your own. It runs wherever examples are
        loaded, with --workers in other processes. Tensors of the batch are moved to the device, in dicts, lists, tuples
        and dataclasses, or by the batch's own method `to(device)`.
        """
        return default_collate(examples)

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

    def outputs(self, model: torch.nn.Module, batch: Any) -> Mapping[str, Tensor | NDArray[Any]]:
        """Return outputs of a batch of B examples, tensors or arrays (B, ...) whose other sizes never change.

        With a method `summarise`, it is called in evaluations, without gradients, unless `score` has returned outputs;
        and by `hvdtrain predict`.
        """
        raise NotImplementedError
