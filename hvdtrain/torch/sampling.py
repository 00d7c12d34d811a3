"""Calling a torch recipe's `sampler`."""

from __future__ import annotations

from typing import Any

import torch

from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.recipe.given_order import GivenOrder, read_given_order
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.data import seed_all

SAMPLER_SEED = -2  # in the place of a step's example, so that a sampler draws other numbers than an example does


def draw_order(recipe: DatasetRecipe, count: int, seed: int, epoch: int) -> GivenOrder | None:
    """Return what the recipe gives for an epoch of training of `count` examples; None for a shuffled one.

    Raises:
        UserError: it is not a valid order.
        RecipeError: for what the recipe raises.
    """
    call = f"sampler('train', {epoch})"
    seed_all([seed, epoch, SAMPLER_SEED])
    with in_recipe(recipe, call):
        returned: Any = recipe.sampler("train", epoch)
        if isinstance(returned, torch.utils.data.Sampler):
            returned = list(returned)
    if returned is None:
        return None
    if isinstance(returned, torch.Tensor):
        returned = returned.detach().cpu()
        returned = (returned.double() if returned.is_floating_point() else returned).numpy()
    return read_given_order(returned, name_call(recipe, call), count)
