"""The model of a finished run: from a recipe and a checkpoint's state, without training it."""

from __future__ import annotations

import torch
from torch import nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.consistency import check_same_model
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recipe_state import RecipeState
from hvdtrain.torch.sandbox import preserve_random_state
from hvdtrain.torch.setup import make_model
from hvdtrain.torch.tensors import load_module_state, read_tensors

AVERAGED_PREFIX = "module."  # of the names in the state of an AveragedModel


def select_evaluated_weights(state: StateDict) -> StateDict:
    """Return the weights of a checkpoint that its evaluation used, by the model's names: averages if the run has them.

    state: what `serialize_state` has written.
    """
    if "ema" not in state:
        return state["model"]  # type: ignore[no-any-return]
    averaged = state["ema"].items()
    return {name.removeprefix(AVERAGED_PREFIX): value for name, value in averaged if name.startswith(AVERAGED_PREFIX)}


def restore_model(recipe: Recipe, data: bytes, seed: int, device: str) -> nn.Module:
    """Return a recipe's model in evaluation mode, with the weights of a checkpoint that its evaluation used.

    Args:
        recipe: the run's.
        data: the checkpoint's state.
        seed: the run's, for what `model()` draws and the checkpoint does not hold.
        device: to put the model on.

    Raises:
        UserError: the state is of another model, or the device is not there.
        RecipeError: `model()` or `load_state()` fails.
    """
    try:
        place = torch.device(device)
        state: StateDict = read_tensors(data, place)
    except (RuntimeError, AssertionError) as error:  # torch's, without CUDA or of a wrong name
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    with preserve_random_state():
        seed_all([seed])
        model = make_model(recipe).to(place)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    weights = select_evaluated_weights(state)
    check_same_model(model, weights)
    try:
        load_module_state(model, weights)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint is of another model: {str(error).splitlines()[-1].strip()}") from error
    if "recipe" in state:
        RecipeState(recipe).load_values(state["recipe"])
    return model.eval()
