"""Models of finished runs of other frameworks' recipes: loaded, and used for predictions."""

from __future__ import annotations

from typing import Any

from hvdtrain.bridge.recipe import Adaptation, ForeignFramework, adapt_recipe
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.shares import even_shares
from hvdtrain.system.errors import UserError
from hvdtrain.torch.loading import restore_model
from hvdtrain.torch.predictor import TorchPredictor


def load_foreign_model(recipe: Any, state: bytes, seed: int, device: str, framework: ForeignFramework) -> Any:
    """Return a recipe's model as its author knows it, with weights of a checkpoint: `torch.loading.restore_model`."""
    adaptation = Adaptation(recipe, framework)
    shadow = restore_model(adapt_recipe(adaptation), state, seed, device)
    return adaptation.bridge.export_model(shadow)  # type: ignore[arg-type]


class BridgePredictor(TorchPredictor):
    """`hvdtrain.recipe.framework.Predictor` for a recipe of another framework."""

    def __init__(
        self, recipe: Any, state: bytes, world: World, options: StepOptions, framework: ForeignFramework
    ) -> None:
        """Load the model on all ranks. Raises UserError, RecipeError: on all ranks alike."""
        name = type(recipe).__name__
        if not framework.calls_model and not is_overridden(recipe, "outputs"):
            raise UserError(
                f"{name} has no method outputs(self, model, batch), which returns what is to be predicted: write it, "
                "{name: (B, ...)}"
            )
        options = framework.configure_options(options, world)
        sizes = options.find_pass_sizes(recipe.batch_size, even_shares(world.size))
        adaptation = Adaptation(recipe, framework, options.optimization.amp, sizes)
        super().__init__(adapt_recipe(adaptation, has_outputs=True), state, world, options)
