"""The framework torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.framework import FRAMEWORKS, Framework, Step

if TYPE_CHECKING:
    from hvdtrain.torch.recipe import Recipe


def make_torch_step(recipe: Recipe, world: World, options: StepOptions) -> Step:
    """Return the Step of a torch recipe."""
    from hvdtrain.torch.step import TorchStep

    return TorchStep(recipe, world, options)


FRAMEWORKS.register("torch", Framework("torch", "hvdtrain.torch.Recipe", make_torch_step))
