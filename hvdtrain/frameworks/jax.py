"""The framework JAX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvdtrain.recipe.framework import FRAMEWORKS, Framework, Predictor, Step

if TYPE_CHECKING:
    from hvdtrain.bridge.recipe import ForeignFramework
    from hvdtrain.bridge.step import BridgeStep
    from hvdtrain.comm.world import World
    from hvdtrain.exchange.step_options import StepOptions
    from hvdtrain.jax.recipe import Recipe, Tree


def adapt_jax() -> ForeignFramework:
    """Return how JAX recipes are adapted to torch."""
    from hvdtrain.bridge.process import configure_jax
    from hvdtrain.bridge.recipe import ForeignFramework
    from hvdtrain.jax.functions import make_jax_functions

    return ForeignFramework(make_jax_functions, configure_jax)


def make_jax_step(recipe: Recipe, world: World, options: StepOptions) -> Step:
    """Return the Step of a JAX recipe."""
    from hvdtrain.bridge.step import BridgeStep

    return BridgeStep(recipe, world, options, adapt_jax())


def load_jax_weights(step: BridgeStep, path: Path, partial: bool) -> list[str]:
    """Begin a new run with the weights of a file."""
    from hvdtrain.torch.initial_weights import load_initial_weights

    return load_initial_weights(step, path, partial)


def load_jax_model(recipe: Recipe, state: bytes, seed: int, device: str) -> dict[str, Tree]:
    """Return the model of a JAX recipe with a checkpoint's weights: {"params": ..., ...}."""
    from hvdtrain.bridge.loading import load_foreign_model

    model: dict[str, Tree] = load_foreign_model(recipe, state, seed, device, adapt_jax())
    return model


def make_jax_predictor(recipe: Recipe, state: bytes, world: World, options: StepOptions) -> Predictor:
    """Return the Predictor of a JAX recipe."""
    from hvdtrain.bridge.loading import BridgePredictor

    return BridgePredictor(recipe, state, world, options, adapt_jax())


FRAMEWORKS.register(
    "jax",
    Framework(
        name="jax",
        recipe_class="hvdtrain.jax.Recipe",
        make_step=make_jax_step,
        load_weights=load_jax_weights,
        load_model=load_jax_model,
        make_predictor=make_jax_predictor,
    ),
)
