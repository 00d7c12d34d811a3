"""The recipe for Keras 3."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from hvdtrain.data.stacking import stack_examples
from hvdtrain.keras.choice import current_backend, prepare_keras
from hvdtrain.recipe.dataset_recipe import DatasetRecipe

prepare_keras()  # unless Keras is imported already, as by a recipe before this
Tensor: TypeAlias = Any  # of the backend
Scores: TypeAlias = Mapping[str, Tensor | tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class Recipe(DatasetRecipe):
    """A Keras recipe: subclass it with `@dataclass(kw_only=True)` and write four methods.

    `score` must return one value per example, never a mean: that is what makes weighting, accumulation and metrics
    exact. `dataset` returns map-style datasets of numpy arrays, such as `hvdtrain.data.Arrays(x, y)`, not loaders:
    hvdtrain shards them, and `collate` makes batches of their examples. Written with `keras.ops`, `score` runs on each
    of Keras's backends.
    """

    framework: ClassVar[str] = "keras"
    # `buffers` names variables that training changes besides the weights by their paths, with dots:
    # "sequential.counter.count". The moving statistics of BatchNormalization are means by themselves.
    stack_examples: ClassVar[Callable[[list[Any]], Any]] = staticmethod(stack_examples)

    backend: Literal["jax", "tensorflow", "torch"] = dataclasses.field(
        default_factory=current_backend,  # type: ignore[arg-type]  # or it is refused when Keras is imported
        metadata={
            "help": "what Keras computes with; default: KERAS_BACKEND, else the first of these that is installed",
            "section": "Device",
        },
    )

    @abstractmethod
    def model(self) -> Any:
        """Return the model, a `keras.Model`, with its initial weights; it need not be compiled.

        A model that is not built yet is built by a call of `score` with two examples.
        """
        raise NotImplementedError

    @abstractmethod
    def optimizer(self) -> Any:
        """Return a `keras.optimizers.Optimizer` at learning rate `self.lr`, without a schedule of its own.

        For several losses, return a dict of optimizers by the names of the model's own layers: {"generator": ...,
        "discriminator": ...} minimize the scores "loss_generator" and "loss_discriminator".
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, model: Any, batch: Any) -> Scores | tuple[Scores, Mapping[str, Tensor]]:
        """Return the scores of a batch of B examples: {"loss": (B,), ...}; what is not the loss is a metric.

        `model` passes `training` to its layers by itself. What layers add by `add_loss`, and regularizers, are
        minimized with the loss, and are the column `regularization`; the column `loss` is the mean of what `score`
        returns. A value that a layer adds must be a mean over the batch's examples.

        A score may be a pair (numerators, denominators), both (B,): its value is sum / sum over all examples and ranks,
        also of the loss. It may return a pair of dicts (scores, outputs), which saves the second pass of `outputs`.
        Random numbers come from `keras.random.SeedGenerator`s of the model or of the recipe, which hvdtrain seeds.
        """
        raise NotImplementedError
