"""The framework Keras 3."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdtrain.recipe.framework import FRAMEWORKS, Framework, Predictor, Step

if TYPE_CHECKING:
    from hvdtrain.bridge.step import BridgeStep
    from hvdtrain.comm.world import World
    from hvdtrain.exchange.step_options import StepOptions
    from hvdtrain.keras.recipe import Recipe


def prepare_keras_import(backend: str | None) -> None:
    """Choose Keras's backend, before a recipe imports Keras."""
    from hvdtrain.keras.choice import prepare_keras

    prepare_keras(backend)


def make_keras_step(recipe: Recipe, world: World, options: StepOptions) -> Step:
    """Return the Step of a Keras recipe."""
    from hvdtrain.keras.adaptation import KerasStep

    return KerasStep(recipe, world, options)


def load_keras_weights(step: BridgeStep, path: Path, partial: bool) -> list[str]:
    """Begin a new run with the weights of a file."""
    from hvdtrain.torch.initial_weights import load_initial_weights

    return load_initial_weights(step, path, partial)


def load_keras_model(recipe: Recipe, state: bytes, seed: int, device: str) -> Any:
    """Return the `keras.Model` of a Keras recipe with a checkpoint's weights."""
    from hvdtrain.bridge.loading import load_foreign_model
    from hvdtrain.keras.adaptation import adapt_keras

    return load_foreign_model(recipe, state, seed, device, adapt_keras())


def make_keras_predictor(recipe: Recipe, state: bytes, world: World, options: StepOptions) -> Predictor:
    """Return the Predictor of a Keras recipe."""
    from hvdtrain.bridge.loading import BridgePredictor
    from hvdtrain.keras.adaptation import adapt_keras

    return BridgePredictor(recipe, state, world, options, adapt_keras())


FRAMEWORKS.register(
    "keras",
    Framework(
        name="keras",
        recipe_class="hvdtrain.keras.Recipe",
        make_step=make_keras_step,
        prepare_import=prepare_keras_import,
        load_weights=load_keras_weights,
        load_model=load_keras_model,
        make_predictor=make_keras_predictor,
    ),
)
