"""The training step of recipes of other frameworks: torch's, with a shadow of their model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.bridge.recipe import Adaptation, ForeignFramework, adapt_recipe
from hvdtrain.bridge.shadow import Shadow
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.framework import RoundResult
from hvdtrain.recipe.now import temporary_now
from hvdtrain.recipe.shares import Shares, even_shares
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.sandbox import preserve_random_state
from hvdtrain.torch.step import TorchStep

NUM_COMPARED = 8  # examples in which two that differ are looked for


class BridgeStep(TorchStep):
    """`hvdtrain.recipe.framework.Step` for a recipe of another framework.

    Attributes:
        model: the shadow of the recipe's model.
        adaptation: of the recipe.
    """

    model: Shadow

    def __init__(self, recipe: Any, world: World, options: StepOptions, framework: ForeignFramework) -> None:
        """Prepare training with all other ranks, as `TorchStep` does. Raises UserError, RecipeError."""
        refuse_options(type(recipe).__name__, options)
        options = framework.configure_options(options, world)
        self.adaptation = Adaptation(
            recipe,
            framework,
            options.optimization.amp,
            options.find_pass_sizes(recipe.batch_size, even_shares(world.size)),
        )
        super().__init__(adapt_recipe(self.adaptation), world, options)
        try:
            self._choose_sizes()
        except BaseException:
            self.close()
            raise
        self._messages += self._describe_sizes()

    def _choose_sizes(self) -> None:
        """Decide whether batches are padded, and who copies gradients."""
        self._follow_world()
        with preserve_random_state(), temporary_now(self.recipe, self.recipe.now), in_recipe(self.recipe, "score()"):
            bridge = self.adaptation.bridge
            bridge.examples = self.splits.load_first_batch(NUM_COMPARED)
            bridge.find_mixing(self.model, bridge.examples, "training")

    def deal_batch(self, shares: Shares) -> None:
        super().deal_batch(shares)
        self._set_pass_sizes(shares)

    def _set_pass_sizes(self, shares: Shares) -> None:
        # This rank's own: padded to another one's, its batches would cost it what that one's do.
        sizes = self.options.find_pass_sizes(self.recipe.batch_size, shares, self.world.rank)
        self.adaptation.bridge.pass_sizes = sizes

    def _follow_world(self) -> None:
        bridge, exchange = self.adaptation.bridge, self.options.exchange
        self._set_pass_sizes(even_shares(self.world.size))
        is_exchanged = exchange.deterministic or (self.world.size > 1 and exchange.kind == "bucketed")
        # In local steps torch adds them up.
        bridge.copies_gradients = not is_exchanged or self.options.rounds.local_steps is not None

    def _describe_sizes(self) -> list[str]:
        if not self.adaptation.bridge.mixes_examples["training"]:
            return []
        return [
            "batches   score mixes examples or changes state (batch norm): compiled for each number of examples, "
            "not padded"
        ]

    def count_compilations(self) -> int | None:
        return self.adaptation.bridge.backend.num_compilations

    def trace_graph(self) -> bytes | None:
        return None

    def evaluated_model(self, seed: Sequence[int]) -> Any:
        return self.adaptation.bridge.export_model(super().evaluated_model(seed))  # type: ignore[arg-type]

    def end_round(self) -> RoundResult:
        self.model.own_memory()
        return super().end_round()

    def local_state(self) -> bytes:
        self.model.own_memory()  # the anchor is written into it
        return super().local_state()

    def switch_world(self, world: World) -> None:
        super().switch_world(world)
        self._follow_world()


def refuse_options(recipe: str, options: StepOptions) -> None:
    """Raise UserError for options that mean something for torch's recipes only."""
    if options.optimization.compile:
        raise UserError(f"--compile is for torch, and {recipe} is compiled without it: leave it out")
    if options.optimization.recompute is not None:
        raise UserError(
            f"--recompute is for torch, and {recipe} is not a torch recipe: in score, put jax.checkpoint around a "
            "block, or make Keras's layers within keras.RematScope()"
        )
    if options.exchange.shards_optimizer:
        raise UserError(
            f"--shard optimizer is for torch, and {recipe}'s compiled update takes whole gradients: leave it out"
        )
    if options.pipeline.stages > 1:
        raise UserError(f"{options.pipeline.flag} is for torch, and {recipe} is not a torch recipe: leave it out")
    if options.optimization.sync_batchnorm:
        raise UserError(
            f"--sync-batchnorm is for torch, and {recipe} is not a torch recipe: use group or layer norm, whose "
            "statistics are of one example"
        )
