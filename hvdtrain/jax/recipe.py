"""The recipe for JAX."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from hvdtrain.data.stacking import stack_examples
from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.system.errors import UserError

Tree: TypeAlias = Any  # nested dicts, lists, tuples and other nodes of arrays, as JAX has them (a pytree)


@dataclass(kw_only=True)
class Recipe(DatasetRecipe):
    """A JAX recipe: subclass it with `@dataclass(kw_only=True)` and write four methods.

    `score` must return one value per example, never a mean: that is what makes weighting, accumulation and metrics
    exact. `dataset` returns objects with len() and [i], of numpy arrays. What training changes next to "params" is
    combined over ranks after each step: numbers with a fraction as means, others as `buffers` says.
    """

    framework: ClassVar[str] = "jax"
    stack_examples: ClassVar[Callable[[list[Any]], Any]] = staticmethod(stack_examples)

    @abstractmethod
    def model(self, key: Any) -> Mapping[str, Tree]:
        """Return {"params": a tree of arrays that is trained, ...}; other collections are what training changes.

        What flax.linen's `init` returns, as it is. Of an equinox module the arrays, by `eqx.partition`; of an nnx one
        by `nnx.split`: what is left is kept on self.

        Args:
            key: a JAX random key, from --seed.
        """
        raise NotImplementedError

    def current_model(self) -> Mapping[str, Tree]:
        """Return a copy of the model with its present values: for examples that it plays (hvdtrain.data.Rollouts)."""
        raise UserError(f"{type(self).__name__}.current_model() has a model in a training only: call it in `play`")

    @abstractmethod
    def optimizer(self) -> Any:
        """Return an optax.GradientTransformation at learning rate `self.lr`.

        Its updates are multiplied with the schedule's factor, which is what a schedule inside does for sgd and all
        kinds of adam; where a learning rate is part of a momentum (lars, rmsprop with momentum), wrap the optimizer in
        optax.inject_hyperparams, whose `learning_rate` is then set.

        For several losses, return a dict by top-level keys of "params": {"generator": ..., "discriminator": ...}
        minimize the scores "loss_generator" and "loss_discriminator".
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, model: Mapping[str, Tree], batch: Any, key: Any) -> Any:
        """Return the scores of a batch of B examples: {"loss": (B,), ...}; what is not the loss is a metric.

        It is compiled (jax.jit). A score may be a pair (numerators, denominators), and a metric (B, k): see
        hvdtrain.torch.Recipe.score. What training changes otherwise is returned next to the scores: (scores,
        {"batch_stats": new}); so are per-example outputs, (scores, {"batch_stats": new, "logits": (B, 10)}).

        Args:
            model: as `model` has returned it, with present values.
            batch: of the examples' numpy arrays, as `collate` has joined them.
            key: a JAX random key, another one for each pass; None in an evaluation.
        """
        raise NotImplementedError
