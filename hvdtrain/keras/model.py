"""A recipe's Keras model, and the names of its variables."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import keras

from hvdtrain.bridge.functions import Arrays, Batch
from hvdtrain.bridge.padding import map_arrays
from hvdtrain.keras.recipe import Recipe
from hvdtrain.keras.scope import Variable
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call

SEED_STATE = "seed_generator_state"


@contextlib.contextmanager
def temporary_policy(policy: str | None) -> Iterator[None]:
    """Set the dtype policy of layers that are made; None: leave it as it is."""
    previous = keras.config.dtype_policy()
    if policy is not None:
        keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def build_keras_model(recipe: Recipe) -> Any:
    """Return the recipe's model, whose variables have the same names each time. Raises UserError, RecipeError."""
    policy = keras.config.dtype_policy()
    keras.backend.clear_session(free_memory=False)  # names are counted in the process; policies are forgotten too
    keras.config.set_dtype_policy(policy)
    with in_recipe(recipe, "model()"):
        model = recipe.model()
    if not isinstance(model, keras.Layer):
        raise UserError(
            f"{name_call(recipe, 'model()')} returned {type(model).__name__}; expected a keras.Model"
            + (": does it lack a return?" if model is None else "")
        )
    return model


def name_variables(recipe: Recipe, variables: Iterable[Variable], taken: Collection[str] = ()) -> dict[str, Variable]:
    """Return variables by their paths, with dots. Raises UserError if a path is there twice, or in `taken`."""
    named: dict[str, Variable] = {}
    for variable in variables:
        name = variable.path.replace("/", ".")
        if name in named or name in taken:
            raise UserError(
                f"{name_call(recipe, 'model()')}: two variables have the path {variable.path!r}; give the layers that "
                "own them names of their own"
            )
        named[name] = variable
    return named


def read_variables(variables: Mapping[str, Variable]) -> Arrays:
    """Return the values of variables, by the same names."""
    return {name: keras.ops.stop_gradient(variable.value) for name, variable in variables.items()}


def convert_batch(batch: Batch) -> Batch:
    """Return a nested batch of numpy arrays as arrays of the backend."""
    return map_arrays(keras.ops.convert_to_tensor, batch)


def select_part(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a nested batch of arrays of the backend."""
    return keras.tree.map_structure(lambda array: array[rows], batch)


def find_seeds(recipe: Recipe, model: Any) -> list[Any]:
    """Return the variables of the seed generators that `score` may draw from: of the model, of the recipe, of Keras.

    Raises UserError for a layer of the recipe's that has weights which are not the model's.
    """
    known = {id(variable) for variable in model.variables}
    found = [variable for variable in model.non_trainable_variables if variable.path.endswith(SEED_STATE)]
    for name, value in vars(recipe).items():
        if isinstance(value, keras.random.SeedGenerator):
            found.append(value.state)
        elif isinstance(value, keras.Layer):
            for variable in value.variables:
                if variable.trainable and id(variable) not in known:
                    raise UserError(
                        f"{type(recipe).__name__}.{name} has weights that are not of the model, and would not be "
                        f"trained, such as {variable.path!r}: make it a layer of the model"
                    )
                found += [variable] if variable.path.endswith(SEED_STATE) else []
    if keras.config.backend() != "jax":  # where Keras refuses it
        found.append(keras.src.random.seed_generator.global_seed_generator().state)
    return list({id(variable): variable for variable in found}.values())
