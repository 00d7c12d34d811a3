"""The framework torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvdtrain.recipe.framework import FRAMEWORKS, Framework, Predictor, Step

if TYPE_CHECKING:
    from torch import nn

    from hvdtrain.comm.world import World
    from hvdtrain.exchange.step_options import StepOptions
    from hvdtrain.torch.recipe import Recipe
    from hvdtrain.torch.step import TorchStep


def make_torch_step(recipe: Recipe, world: World, options: StepOptions) -> Step:
    """Return the Step of a torch recipe."""
    if options.pipeline.stages > 1:
        from hvdtrain.torch.pipeline_step import PipelineStep

        return PipelineStep(recipe, world, options)
    from hvdtrain.torch.step import TorchStep

    return TorchStep(recipe, world, options)


def load_torch_weights(step: TorchStep, path: Path, partial: bool) -> list[str]:
    """Begin a new run with the weights of a file."""
    from hvdtrain.torch.initial_weights import load_initial_weights

    return load_initial_weights(step, path, partial)


def load_torch_model(recipe: Recipe, state: bytes, seed: int, device: str) -> nn.Module:
    """Return the model of a torch recipe with a checkpoint's weights."""
    from hvdtrain.torch.loading import restore_model

    return restore_model(recipe, state, seed, device)


def make_torch_predictor(recipe: Recipe, state: bytes, world: World, options: StepOptions) -> Predictor:
    """Return the Predictor of a torch recipe."""
    from hvdtrain.torch.predictor import TorchPredictor

    return TorchPredictor(recipe, state, world, options)


FRAMEWORKS.register(
    "torch",
    Framework(
        name="torch",
        recipe_class="hvdtrain.torch.Recipe",
        make_step=make_torch_step,
        load_weights=load_torch_weights,
        load_model=load_torch_model,
        make_predictor=make_torch_predictor,
    ),
)
