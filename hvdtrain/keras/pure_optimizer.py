"""Keras optimizers as pure functions, on all backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer

from hvdtrain.bridge.functions import Array, Arrays, PureOptimizer, name_loss
from hvdtrain.keras.recipe import Recipe
from hvdtrain.keras.scope import PureScope, Variable
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.recipe_errors import in_recipe, name_call

# Methods that Keras's TensorFlow optimizers have for tf.Variables only; the base class's are for any value.
ON_TENSORS = ("assign", "assign_add", "assign_sub", "_var_key", "_apply_weight_decay", "_backend_update_step")
EXPECTED = "expected a keras.optimizers.Optimizer"
# Arguments that change when, or on what, an optimizer steps: hvdtrain's own options do that exactly on any ranks.
REFUSED_ARGUMENTS = {
    "use_ema": "give --ema",
    "loss_scale_factor": "give --amp",
    "gradient_accumulation_steps": "give --micro-batch",
}


class KerasOptimizer:
    """`hvdtrain.bridge.functions.PureOptimizer` of a Keras optimizer.

    Attributes:
        parameters: the names of the parameters that it updates.
        lr: its learning rate before the schedule.
        state: its initial state, by name, without the learning rate.
    """

    def __init__(self, optimizer: Any, variables: Mapping[str, Variable]) -> None:
        self.parameters: Sequence[str] = list(variables)
        self.lr = float(keras.ops.convert_to_tensor(optimizer.learning_rate))
        if keras.config.backend() == "tensorflow":
            use_tensors(optimizer)
        self._optimizer, self._trained = optimizer, variables
        optimizer.build(list(variables.values()))
        self._rate = optimizer._learning_rate
        kept = [variable for variable in optimizer.variables if variable is not self._rate]
        self._variables = {f"{number}.{variable.name}": variable for number, variable in enumerate(kept)}
        self.state = {name: keras.ops.copy(variable.value) for name, variable in self._variables.items()}

    def update(self, gradients: Arrays, state: Arrays, params: Arrays, factor: Array) -> tuple[Arrays, Arrays]:
        """Return the new parameters and the new state. On the backend torch they are the old ones, changed in place."""
        values = [(variable, params[name]) for name, variable in self._trained.items()]
        values += [(variable, state[name]) for name, variable in self._variables.items()]
        rate = keras.ops.multiply(keras.ops.cast(factor, self._rate.dtype), self.lr)
        with PureScope([*values, (self._rate, rate)]) as scope:
            self._optimizer.apply([gradients[name] for name in self.parameters], list(self._trained.values()))
            new_params = {name: scope.get_current_value(variable) for name, variable in self._trained.items()}
            new_state = {name: scope.get_current_value(variable) for name, variable in self._variables.items()}
        return new_params, new_state


def use_tensors(optimizer: Any) -> None:
    """Let a TensorFlow optimizer compute with tensors: what TFOptimizer does to tf.Variables its base does to both."""
    from keras.src.backend.tensorflow.optimizer import TFOptimizer

    methods = {name: getattr(BaseOptimizer, name) for name in ON_TENSORS}
    # In the order of resolution it comes right before TFOptimizer.
    replacement = type("TensorOptimizer", (TFOptimizer,), methods)
    optimizer.__class__ = type(type(optimizer).__name__, (type(optimizer), replacement), {})


def make_pure_optimizers(
    recipe: Recipe, model: Any, trained: Mapping[str, Variable]
) -> tuple[Mapping[str, PureOptimizer], bool]:
    """Return the recipe's optimizers by the names of their losses, and whether it returned a dict of them.

    Args:
        recipe: whose method `optimizer` is called.
        model: what it trains.
        trained: the model's trainable variables, by name.

    Raises:
        UserError, RecipeError: it returned something else, or an optimizer that cannot be exact.
    """
    caller = name_call(recipe, "optimizer()")
    with in_recipe(recipe, "optimizer()"):
        returned = recipe.optimizer()
    if not isinstance(returned, dict):
        check_exactness(caller, returned)
        return {"loss": KerasOptimizer(returned, trained)}, False
    layers = {layer.name: layer for layer in model._flatten_layers(include_self=False, recursive=False)}
    optimizers: dict[str, PureOptimizer] = {}
    owners: dict[int, str] = {}
    for key, optimizer in returned.items():
        if key not in layers:
            raise UserError(
                f"{caller} returned a dict with the key {key!r}; expected names of the model's layers"
                f"{suggest_nearest(str(key), list(layers))}"
            )
        check_exactness(caller, optimizer)
        own = {id(variable): name for name, variable in trained.items() if is_of_layer(variable, layers[key])}
        for shared in own.keys() & owners.keys():
            raise UserError(f"{caller}: {owners[shared]!r} and {key!r} share a weight; expected one optimizer for both")
        for number in own:
            owners[number] = str(key)
        optimizers[name_loss(key)] = KerasOptimizer(optimizer, {name: trained[name] for name in own.values()})
    for name, variable in trained.items():
        if id(variable) not in owners:
            raise UserError(
                f"{caller} returned no optimizer for {name!r}; expected one for each of the model's layers "
                "with weights, by its name: add it, or freeze the layer (trainable = False)"
            )
    return optimizers, True


def is_of_layer(variable: Any, layer: Any) -> bool:
    """Return whether a layer has a trainable variable."""
    return any(variable is other for other in layer.trainable_variables)


def check_exactness(caller: str, optimizer: Any) -> None:
    """Raise UserError for what is not a Keras optimizer, or is one that hvdtrain cannot step exactly."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        lacks = ": does it lack a return?" if optimizer is None else ""
        raise UserError(f"{caller} returned {type(optimizer).__name__}; {EXPECTED}{lacks}")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError(
            f"{caller} returned a LossScaleOptimizer; expected the optimizer in it: --amp fp16 scales losses"
        )
    if not isinstance(optimizer._learning_rate, keras.Variable):
        raise UserError(
            f"{caller} returned {type(optimizer).__name__} with a learning rate that is a "
            f"{type(optimizer._learning_rate).__name__}; expected a number: give --schedule"
        )
    for argument, instead in REFUSED_ARGUMENTS.items():
        if getattr(optimizer, argument, None):
            raise UserError(
                f"{caller} returned {type(optimizer).__name__} with {argument}={getattr(optimizer, argument)!r}, which "
                f"hvdtrain does: leave it out, and {instead}"
            )
    if optimizer.built:
        raise UserError(f"{caller} returned an optimizer that is built already; expected a new one each time")
