"""A Keras recipe as pure functions of the values of its model's variables.

Variables have the names of their paths, with dots: "sequential.dense.kernel".

    trainable variables        params
    other variables            state: moving statistics, counters, frozen layers
    states of seed generators  neither: each is derived from `entropy` and its number
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from hvdtrain.bridge.compiled_now import compiled_now
from hvdtrain.bridge.functions import Arrays, Batch, Entropy, PureOptimizer, Returned
from hvdtrain.keras.model import (
    build_keras_model,
    convert_batch,
    find_seeds,
    name_variables,
    read_variables,
    select_part,
    temporary_policy,
)
from hvdtrain.keras.modes import LayerInMode, layer_mode
from hvdtrain.keras.pure_optimizer import make_pure_optimizers
from hvdtrain.keras.recipe import Recipe
from hvdtrain.keras.regularization import REGULARIZATION, add_regularization, sum_regularization
from hvdtrain.keras.scope import PureScope
from hvdtrain.keras.seeds import derive_seeds
from hvdtrain.recipe.base import is_overridden
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call

AMP_POLICIES = {"off": None, "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}


class KerasFunctions:
    """`hvdtrain.bridge.functions.Functions` of a Keras recipe.

    Attributes:
        model: the recipe's. The values in its own variables are not those that are trained.
        adds_losses: whether a layer has called `add_loss`.
    """

    def __init__(self, recipe: Recipe, load_examples: Callable[[], Batch], amp: str, device: str | None) -> None:
        """Make the recipe's model and optimizer.

        Args:
            recipe: with its options.
            load_examples: returns two examples, for models that are built when they are called.
            amp: as the option --amp.
            device: where torch computes, if it is the backend; None: where Keras chooses.

        Raises:
            UserError, RecipeError: what the recipe returns cannot be trained.
        """
        self.recipe, self.device, self.adds_losses = recipe, device, False
        self._has_regularization = False  # in training, and so in evaluations
        with self._open_keras(), temporary_policy(AMP_POLICIES[amp]):
            self.model = build_keras_model(recipe)
            if not self.model.built:
                examples = convert_batch(load_examples())
                with self._open_mode(training=False), in_recipe(recipe, "score()"):
                    recipe.score(LayerInMode(self.model, False), examples)
            self.seeds = find_seeds(recipe, self.model)
            trained = name_variables(recipe, self.model.trainable_variables)
            self.optimizers: Mapping[str, PureOptimizer]
            self.optimizers, self.several = make_pure_optimizers(recipe, self.model, trained)
        seeds = set(map(id, self.seeds))
        others = [variable for variable in self.model.non_trainable_variables if id(variable) not in seeds]
        self._params, self._state = trained, name_variables(recipe, others, taken=trained)
        self.params, self.state = read_variables(self._params), read_variables(self._state)

    def score(self, params: Arrays, state: Arrays, batch: Batch, entropy: Entropy | None) -> Returned:
        """Call the recipe's `score`; what its layers add to the loss is differentiated with each of the losses."""
        training, caller = entropy is not None, name_call(self.recipe, "score()")
        with self._open_scope(params, state, entropy) as scope, self._open_mode(training):
            returned = self.recipe.score(LayerInMode(self.model, training), batch)
            scores, outputs = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
            self.adds_losses |= bool(scope.added_losses)
            added = sum_regularization(self.model, scope)
            self._has_regularization |= training and added is not None
            if added is None and self._has_regularization:
                added = keras.ops.zeros((), "float32")
            if added is not None and isinstance(scores, Mapping):
                scores = add_regularization(caller, scores, list(self.optimizers), added)
            new_state = {name: scope.get_current_value(variable) for name, variable in self._state.items()}
        scope.check_changes(caller)
        return Returned(scores, new_state, outputs)

    def outputs(self, params: Arrays, state: Arrays, batch: Batch) -> Any:
        """Call the recipe's `outputs`, or the model if it has none, with the batch or the first part of a tuple."""
        model = LayerInMode(self.model, False)
        with self._open_scope(params, state, None), self._open_mode(training=False):
            if not is_overridden(self.recipe, "outputs"):
                returned = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
                return dict(returned) if isinstance(returned, Mapping) else {"output": returned}
            returned = self.recipe.outputs(model, batch)
        return dict(returned) if isinstance(returned, Mapping) else returned

    def export_model(self, params: Arrays, state: Arrays) -> Any:
        """Return the recipe's model with these values."""
        with self._open_keras():
            for name, variable in self._params.items():
                variable.assign(params[name])
            for name, variable in self._state.items():
                variable.assign(state[name])
        return self.model

    def check_added_losses(self, batch: Batch) -> None:
        """Raise UserError if it matters for what layers add to the loss how examples are divided among ranks.

        batch: two examples. A mean over the batch's examples is exact, unless the loss is a mean over something else.
        """
        batch, caller = convert_batch(batch), name_call(self.recipe, "score()")
        parts = (slice(2), slice(1), slice(1, 2))
        scores = [self.score(self.params, self.state, select_part(batch, rows), None).scores for rows in parts]
        both, first, second = (float(one[REGULARIZATION][0]) for one in scores)
        found = f"what layers add by add_loss is {first:.6g} and {second:.6g} of one example each"
        if not np.isclose(both, (first + second) / 2, rtol=1e-3):
            raise UserError(
                f"{caller}: {found}, and {both:.6g} of both; expected their mean: add a mean over the batch's examples"
            )
        if any(isinstance(scores[0][name], tuple) for name in self.optimizers) and not np.isclose(first, second):
            raise UserError(
                f"{caller}: {found}, and the loss has denominators of its own; expected the same of each example: add "
                "what depends on the examples to the numerators of the loss"
            )

    @contextlib.contextmanager
    def _open_mode(self, training: bool) -> Iterator[None]:
        with compiled_now(self.recipe, training=training), layer_mode(training):
            yield

    @contextlib.contextmanager
    def _open_keras(self) -> Iterator[None]:
        """Let torch, as Keras's backend, compute on the device."""
        with contextlib.nullcontext() if self.device is None else keras.device(self.device):
            yield

    @contextlib.contextmanager
    def _open_scope(self, params: Arrays, state: Arrays, entropy: Entropy | None) -> Iterator[PureScope]:
        values = [(variable, params[name]) for name, variable in self._params.items()]
        values += [(variable, state[name]) for name, variable in self._state.items()]
        with self._open_keras():
            self.model._clear_losses()  # what layers remember of the last call's
            with PureScope([*values, *derive_seeds(self.seeds, entropy)]) as scope:
                yield scope
