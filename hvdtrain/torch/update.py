"""The recipe's optimizers on all ranks: one for the loss, or one for each of several losses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.framework import ExchangeReport
from hvdtrain.recipe.shares import Shares
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.exchange_report import describe_exchanges
from hvdtrain.torch.groups import check_optimizers, check_several
from hvdtrain.torch.hyperparameters import ParamGroup
from hvdtrain.torch.optimized_loss import OptimizedLoss
from hvdtrain.torch.pruning import make_pruner
from hvdtrain.torch.readable import check_readable
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recompute import explain_recompute_errors
from hvdtrain.torch.rounds import Rounds
from hvdtrain.torch.scores import LossNames, Scores, weigh_loss
from hvdtrain.torch.setup import make_optimizers
from hvdtrain.torch.shard_update import await_updates, conclude_updates
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.sums import StepTotals
from hvdtrain.torch.update_settings import UpdateSettings
from hvdtrain.torch.update_state import UpdaterState


class Updater(UpdaterState):
    """Exchanges gradients and updates the parameters.

    A step is `start_step`, `backward` for each micro-batch, `wait_for_sums`, `reduce_gradients`, and `clip_and_step`
    unless a sum is not finite. With several losses, `select_losses` sets before the last `backward`, on a rank without
    any before `wait_for_sums`, which of them take part: the same on all ranks.

    Attributes:
        losses: the scores that are minimized, each by its optimizer, in the order of the recipe's dict.
        several: whether the recipe returned a dict of optimizers.
        scaler: of --amp fp16.
        rounds: of local steps.
        sums_are_finite: of the step's gradients, as far as exchanges look.
        can_undo: whether the update that was begun can be undone, as not all ranks are known to have made it.
        log_lines: to be reported.
        tables: embedding tables of which each rank has some rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        device: torch.device,
        options: StepOptions,
        tables: DealtTables | None = None,
    ) -> None:
        self.tables = tables
        self.model, self._saves_residuals = model, options.exchange.saves_rank_residuals
        self.log_lines: list[str] = []
        self.scaler = torch.amp.GradScaler(device.type) if options.optimization.amp == "fp16" else None
        optimizers = collectives.on_all_ranks("optimizer", lambda: self._make_optimizers(recipe, options))
        self.pruner = (
            make_pruner(recipe, model, optimizers.values()) if options.optimization.prune is not None else None
        )
        settings = UpdateSettings(
            type(recipe).__name__, model, options, self.scaler, tuple(optimizers), self.several, self.pruner, tables
        )
        self.losses = tuple(OptimizedLoss(name, optimizer, settings) for name, optimizer in optimizers.items())
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=device))  # it starts here even if this rank has no examples
        self.rounds = Rounds(self.losses, model, options.rounds.outer_step)
        self._is_local = self.can_undo = False  # the step
        self._has_joined = False  # a world, now or before
        self._in_step, self.sums_are_finite = self.losses, True  # the losses that take part in the step
        self._steps = 0  # that were exchanged in this process

    def _make_optimizers(self, recipe: Recipe, options: StepOptions) -> dict[str, torch.optim.Optimizer]:
        optimizers, self.several = make_optimizers(recipe, self.model)
        self.log_lines += check_optimizers(recipe, optimizers, self.model)
        if self.several:
            check_several(options, optimizers, self.model)
        return optimizers

    @property
    def loss_names(self) -> LossNames:
        """The names of the losses, and the columns of metrics.jsonl that come with several."""
        suffixes = [loss.column_suffix for loss in self.losses] if self.several else []
        columns = frozenset(f"{column}{suffix}" for column in ("lr", "gradient_norm") for suffix in suffixes)
        return LossNames(tuple(loss.name for loss in self.losses), self.several, columns)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The recipe's optimizers, wrapped, by the names of their losses."""
        return {loss.name: loss.optimizer for loss in self.losses}

    @property
    def param_groups(self) -> list[ParamGroup]:
        """All optimizers' groups, without waiting for gradients as the property of a wrapped optimizer does."""
        return [group for loss in self.losses for group in vars(loss.optimizer).get("param_groups", ())]

    @property
    def waited(self) -> float:
        """Seconds that the last step waited for gradients."""
        return sum(loss.optimizer.waited for loss in self._in_step)

    @property
    def wire_bytes(self) -> int:
        """Bytes of gradients that this rank sends in a step: on average, if nothing, or not all, is sent in some."""
        total = sum(loss.optimizer.wire_bytes * loss.steps for loss in self.losses)
        return int(total / max(1, self._steps))

    def describe_exchange(self) -> ExchangeReport:
        """Return how gradients travel; with several losses, each bucket with the name of its loss."""
        return describe_exchanges(self.losses, self.pruner.sparsity if self.pruner is not None else None)

    # The world.

    def join_world(self, world: World) -> None:
        """Exchange gradients with the ranks of a world; after another one, once `leave_world` was called."""
        for loss in self.losses:
            loss.join_world(world, self.log_lines.append)
        if not self._has_joined:
            check_readable(self.model.state_dict(), "the model's state")
        self._has_joined = True

    def distribute_state(self, world: World, *, is_first: bool) -> None:
        """Have the optimizers' state, or this rank's part of it; arguments as for `OptimizedLoss.distribute_state`."""
        for loss in self.losses:
            self.log_lines += loss.distribute_state(world, is_first=is_first)

    def leave_world(self) -> None:
        """Leave the exchanges of a world; what they have not sent is kept for the next."""
        for loss in self.losses:
            loss.leave_world()
        if self.scaler is not None:
            self.scaler._per_optimizer_states.clear()  # of an update that was not finished

    def close(self) -> None:
        """Give the recipe's optimizers and their parameters back as they were before `join_world`."""
        for loss in self.losses:
            loss.close()

    # A step.

    @property
    def first_shard(self) -> int:
        """The number of this rank's first virtual shard in a deterministic run, else 0."""
        exchange = self.losses[0].shard_exchange
        return exchange.own_shards.start if exchange is not None else 0

    def deal_shards(self, shares: Shares) -> None:
        """In a deterministic run, deal the virtual shards to the ranks by these shares from the next step on."""
        for loss in self.losses:
            if loss.shard_exchange is not None:
                loss.shard_exchange.deal_shards(shares)

    def start_step(self, passes: Sequence[int], is_local: bool) -> None:
        """Drop the last step's gradients; arguments as for `OptimizedLoss.start_step`."""
        self._in_step, self._is_local = self.losses, is_local
        self.rounds.start_step(is_local)
        if self.tables is not None:
            self.tables.start_step()
        for loss in self.losses:
            loss.start_step(passes, is_local)

    def select_losses(self, names: Collection[str]) -> None:
        """Let only these losses take part in the step, on all ranks alike."""
        self._in_step = tuple(loss for loss in self.losses if loss.name in names)
        for loss in self.losses:
            if loss.name not in names:
                loss.leave_out()

    @explain_recompute_errors
    def backward(self, scores: Scores, weight: float, last: bool) -> None:
        """Add the gradients of `weight` * the sum of each loss in `scores`, and start exchanging what is ready.

        Args:
            scores: by name; of a pair, the numerators are differentiated.
            weight: of each example.
            last: whether this is the step's last micro-batch on this rank.
        """
        present = [loss for loss in self.losses if loss.name in scores]
        for loss in present:
            objective = weigh_loss(scores[loss.name], weight)
            if self.scaler is not None and objective.requires_grad:
                objective = self.scaler.scale(objective)
            loss.backward(objective, last, keep_graph=loss is not present[-1])

    def wait_for_sums(self) -> None:
        """Wait for the gradients' sums over ranks."""
        self.sums_are_finite = True
        for loss in self._in_step:  # each, whatever the others are
            self.sums_are_finite &= loss.wait_for_sums()

    def set_sums_finite(self, finite: bool) -> None:
        """Take over what ranks with other stages of the model have agreed on of `wait_for_sums`."""
        self.sums_are_finite = finite
        for exchange in filter(None, (loss.bucketed_exchange for loss in self._in_step)):
            exchange.sums_are_finite = finite

    def reduce_gradients(self, totals: StepTotals) -> tuple[str, ...]:
        """Finish exchanging gradients; return the names of parameters whose sums over ranks are not finite.

        What compression has not sent is of gradients that are not multiplied, and stays as it was if a loss is not
        updated.

        totals: of the step; by its factors gradients of the sum of losses / examples become those of the loss, 0: it is
            not updated.
        """
        self._steps += 1
        self.rounds.step_examples = totals.own_examples
        # A loss scale skips the losses one by one.
        is_made = totals.nonfinite_ranks == 0 and (self.scaler is not None or self.sums_are_finite)
        nonfinite: list[str] = []
        for loss in self._in_step:
            factor = totals.own_factors.get(loss.name, 1.0)
            nonfinite += loss.reduce_gradients(is_made and factor > 0)
            loss.gradient_factor = factor
        for loss in self.losses:  # the gradients are whole: a backward() in `evaluated` is none of a step
            if loss.bucketed_exchange is not None:
                loss.bucketed_exchange.announce_pass(last=False)
        return tuple(nonfinite)

    def check_losses_train(self, get_sum: Callable[[str], float]) -> None:
        """Raise UserError if no rank's loss has depended on a parameter so far, and that is not by chance.

        get_sum: returns the sum of a score over the step's examples, by its name.
        """
        for loss in self._in_step:
            if self._is_local:
                self.rounds.record_loss(loss, get_sum(loss.name))
            else:
                loss.check_loss_trains(get_sum(loss.name))

    def clip_and_step(self, factor: float) -> dict[str, float]:
        """Clip, and step at `factor` times the learning rates; return what is to be reported."""
        self.can_undo = bool(self.shards) and all(shards.can_undo for shards in self.shards)
        report: dict[str, float] = {}
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        if self.scaler is not None:
            report["loss_scale"] = scale
        makes_update = not self._is_local or self.rounds.prepare_update()
        for loss in (loss for loss in self._in_step if loss.gradient_factor != 0):
            loss.set_learning_rates(factor)
            report |= loss.clip_and_step() if makes_update else {}
        updated = await_updates(self.shards)
        self.can_undo = False
        conclude_updates(self.shards, updated)
        if self.several:
            report |= {f"lr{loss.column_suffix}": loss.base_lrs[0] * factor for loss in self.losses}
        if self.scaler is not None:
            self.scaler.update()
            new_scale = self.scaler.get_scale()
            report["skipped"] = float(new_scale < scale)
            if new_scale != scale:
                for loss in self.losses:  # also what one that was left out carries is in gradients' units
                    loss.carried.scale(new_scale / scale)
        if self.pruner is not None:
            self.pruner.zero_weights()
        return report

    def prune(self, sparsity: float, average: nn.Module | None) -> float:
        """Prune up to a share of the weights, of a copy of the model too; return the share that is pruned now."""
        assert self.pruner is not None
        if self.pruner.prune_to(sparsity):
            if average is not None:
                self.pruner.zero_copies(self.model, average)
            for loss in self.losses:
                loss.leave_out_pruned()
        return self.pruner.sparsity

    # The state.

    @property
    def shards(self) -> list[OptimizerShards]:
        """This rank's part of each optimizer, if they are sharded."""
        return [loss.shards for loss in self.losses if loss.shards is not None]
