"""The recipe's optimizer on all ranks: gradients are exchanged, checked, clipped and applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.compression.spec import parse_compression
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.sharded import ShardedExchange
from hvdtrain.exchange.state import (
    ExchangeState,
    gather_exchange_state,
    load_exchange_state,
    local_exchange_state,
    restore_local_state,
    scale_state,
)
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.system.errors import UserError
from hvdtrain.torch.groups import check_optimizer, get_parameter_names, match_groups, reorder_state
from hvdtrain.torch.hyperparameters import ParamGroup, StateDict, apply_overrides, get_hyperparameters
from hvdtrain.torch.optimizer import DistributedOptimizer, unwrap_optimizer
from hvdtrain.torch.optimizer_methods import WrappedOptimizer
from hvdtrain.torch.readable import check_readable
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.setup import check_momentum, make_optimizer

# A detector's first batches may hold no object, so that their loss is zero without a graph; 5 in a row do not.
MAX_STEPS_WITHOUT_GRADIENT = 5


class Updater:
    """Exchanges gradients and updates the parameters.

    A step is `start_step`, `backward` for each micro-batch, `reduce_gradients`, and `clip_and_step` unless a sum is not
    finite.

    Attributes:
        optimizer: the recipe's, wrapped.
        bucketed_exchange, shard_exchange: its exchange, if it is the one or the other.
        scaler: of --amp fp16.
        log_lines: to be reported.
        base_lrs: each group's learning rate, before the schedule.
        hyperparameters: what each group was given.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, device: torch.device, options: StepOptions) -> None:
        self.model, self.options = model, options
        self.recipe_name = type(recipe).__name__
        self.log_lines: list[str] = []
        made = collectives.on_all_ranks("optimizer", lambda: self._make_optimizer(recipe))
        self.optimizer = cast(WrappedOptimizer, made)  # as soon as a world is joined
        self.scaler = torch.amp.GradScaler(device.type) if options.optimization.amp == "fp16" else None
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=device))  # it starts here even if this rank has no examples
        self.bucketed_exchange: BucketedExchange | None = None
        self.shard_exchange: ShardedExchange | None = None
        self.base_lrs: list[float] = []
        self.hyperparameters: list[ParamGroup] = []
        self._has_joined = False  # a world, now or before
        self._carried_state: ExchangeState | None = None  # the exchange's, from one world to the next
        self._steps_without_gradient: int | None = 0  # steps made without any gradient; None: there has been one
        self._gradient_norm: Tensor | None = None  # of the step's gradients, if they are to be clipped
        self._state_checked = False

    def _make_optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        optimizer = make_optimizer(recipe, list(self.model.parameters()))
        self.log_lines += check_optimizer(recipe, optimizer, self.model)
        return optimizer

    def join_world(self, world: World) -> None:
        """Exchange gradients with the ranks of a world; after another one, once `leave_world` was called."""
        first = not self._has_joined
        if first:
            check_momentum(parse_compression(self.options.compression.spec), self.optimizer, world)
        held = set(self._optimized_parameters())
        wrapped = DistributedOptimizer(
            self.optimizer,
            [(name, p) for name, p in self.model.named_parameters() if p in held],
            average=False,
            compression=self.options.compression.spec,
            exchange=self.options.exchange.kind,
            seed=self.options.data.seed,
            bucket_bytes=self.options.exchange.bucket_bytes,
            shards=self.options.exchange.num_shards,
        )
        self.optimizer = cast(WrappedOptimizer, wrapped)
        exchange = self.optimizer.exchange
        self.bucketed_exchange = exchange if isinstance(exchange, BucketedExchange) else None
        self.shard_exchange = exchange if isinstance(exchange, ShardedExchange) else None
        if exchange is not None:
            exchange.checks_finite = self.scaler is None and self.options.optimization.clip_norm is None
        if self.bucketed_exchange is not None and self.bucketed_exchange.advisor is not None:
            self.bucketed_exchange.advisor.log_line = self.log_lines.append
        if first:
            self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
            self.hyperparameters = get_hyperparameters(self.optimizer.param_groups)
            self._has_joined = True
            check_readable(self.model.state_dict(), "the model's state")
            check_readable(self.optimizer.state_dict(), "the optimizer's state")

    def leave_world(self) -> None:
        """Leave the exchange of a world; what it has not sent is kept for the next."""
        if self.bucketed_exchange is not None and (self._carried_state is None or self.bucketed_exchange.buckets):
            self._carried_state = local_exchange_state(self.bucketed_exchange)
            # Else the world broke before the state was loaded into it.
        self.close()

    def close(self) -> None:
        """Give the recipe's optimizer and its parameters back as they were before `join_world`."""
        if hasattr(type(self.optimizer), "inner_class"):
            unwrap_optimizer(self.optimizer)

    def _optimized_parameters(self) -> list[nn.Parameter]:
        groups = vars(self.optimizer).get("param_groups", self.optimizer.param_groups)
        return [p for group in groups for p in group["params"]]

    def _collect_gradients(self) -> list[Tensor]:
        return [p.grad for p in self._optimized_parameters() if p.grad is not None]

    def start_step(self, passes: Sequence[int]) -> None:
        """Drop the last step's gradients. passes: the backward passes of each of this rank's shards."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.set_backward_passes_per_step(sum(passes))
        if self.shard_exchange is not None:
            self.shard_exchange.start_exchange(passes)

    def backward(self, objective: Tensor, last: bool) -> None:
        """Add the gradient of an objective, if it has one, and start exchanging what is ready in the last pass."""
        if self.bucketed_exchange is not None:
            self.bucketed_exchange.announce_pass(last)
        if objective.requires_grad:
            (self.scaler.scale(objective) if self.scaler is not None else objective).backward()  # type: ignore[no-untyped-call]
        if self.shard_exchange is not None:
            self.shard_exchange.end_backward_pass()

    def reduce_gradients(self) -> tuple[str, ...]:
        """Finish exchanging gradients; return the names of parameters whose sums over ranks are not finite."""
        self.optimizer.synchronize()
        if self.scaler is not None:
            return ()  # which skips such steps itself
        exchange = self.optimizer.exchange
        if self.options.optimization.clip_norm is not None:
            self._gradient_norm = nn.utils.get_total_norm(self._collect_gradients())
            finite = bool(torch.isfinite(self._gradient_norm))
        else:
            finite = exchange.sums_are_finite if exchange is not None else all_finite(self._collect_gradients())
        if finite:
            return ()
        names = {p: name for name, p in self.model.named_parameters()}
        return tuple(
            names[p] for p in self._optimized_parameters() if p.grad is not None and not all_finite([p.grad])
        ) or ("the sum",)

    def check_loss_trains(self, loss: float) -> None:
        """Raise UserError if no rank's loss has depended on a parameter so far, and that is not by chance.

        Args:
            loss: the sum of the step's losses over all ranks.
        """
        if self._steps_without_gradient is None:
            return
        if self._collect_gradients():
            self._steps_without_gradient = None
            return
        self._steps_without_gradient += 1
        if loss or self._steps_without_gradient == MAX_STEPS_WITHOUT_GRADIENT:
            raise UserError(
                f"{self.recipe_name}.score: 'loss' depends on no parameter that is trained, on no rank: compute it "
                "from the model's outputs, without detach(), item() or no_grad(), and with parameters that require a "
                "gradient"
            )

    def clip_and_step(self, factor: float) -> dict[str, float]:
        """Clip, and step at `factor` times the learning rates; return what is to be reported."""
        groups = self.optimizer.param_groups
        self.base_lrs += [float(group["lr"]) for group in groups[len(self.base_lrs) :]]  # added since
        for group, lr in zip(groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        report: dict[str, float] = {}
        if self.scaler is not None:
            report["loss_scale"] = self.scaler.get_scale()
            self.scaler.unscale_(self.optimizer)
        if self.options.optimization.clip_norm is not None:
            params = [p for p in self._optimized_parameters() if p.grad is not None]
            norm = (
                self._gradient_norm
                if self._gradient_norm is not None
                else nn.utils.get_total_norm(self._collect_gradients())
            )
            nn.utils.clip_grads_with_norm_(params, self.options.optimization.clip_norm, norm)
            report["gradient_norm"], self._gradient_norm = float(norm), None
        if self.scaler is None:
            self._step_optimizer()
        else:
            # The gradients are the same on all ranks, and so is the decision to skip.
            self.scaler.step(self.optimizer)
            self.scaler.update()
            scale = self.scaler.get_scale()
            report["skipped"] = float(scale < report["loss_scale"])
            if self.bucketed_exchange is not None and scale != report["loss_scale"]:
                scale_state(self.bucketed_exchange, scale / report["loss_scale"])
        return report

    def _step_optimizer(self) -> None:
        try:
            self.optimizer.step()
        except (AssertionError, TypeError) as error:
            if "closure" not in str(error):
                raise
            raise UserError(
                f"{self.recipe_name}.optimizer: {type(self.optimizer).__name__} needs a closure: it cannot be used"
            ) from error
        if not self._state_checked:
            check_readable(self.optimizer.state_dict(), "the optimizer's state")
            self._state_checked = True

    def gather_carried_state(self) -> dict[str, object] | None:
        """Return the exchange's part of a checkpoint, the same on all ranks, all of which call this."""
        if self.bucketed_exchange is None:
            return None
        return gather_exchange_state(self.bucketed_exchange, self.options.exchange.saves_rank_residuals).to_checkpoint()

    def local_carried_state(self) -> dict[str, object] | None:
        """Return the exchange's part of this rank's checkpoint after the world has broken, without what is unsent."""
        if self._carried_state is None:
            return None
        return replace(self._carried_state, unsent={}, velocities={}).to_checkpoint()

    def optimizer_state(self) -> StateDict:
        """Return all of the state but the exchange's part."""
        names = get_parameter_names(self.optimizer, self.model)
        state = {"optimizer": self.optimizer.state_dict(), "parameters": names, "settings": self.hyperparameters}
        return state if self.scaler is None else {**state, "scaler": self.scaler.state_dict()}

    def load_state(self, state: StateDict) -> None:
        """Load a state. Raises UserError or torch's own errors for one of other parameters."""
        own, earlier = state["optimizer"], state.get("settings", self.hyperparameters)
        if "parameters" in state:  # an earlier hvdtrain matched by order
            now = get_parameter_names(self.optimizer, self.model)
            places = match_groups(state["parameters"], now)
            own = reorder_state(own, state["parameters"], now)
            earlier = [earlier[place] for place in places if place < len(earlier)]
        self.optimizer.load_state_dict(own)
        apply_overrides(self.optimizer.param_groups, self.hyperparameters, earlier)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.bucketed_exchange is not None and "exchange" in state:
            loaded = ExchangeState.from_checkpoint(state["exchange"])
            load_exchange_state(self.bucketed_exchange, loaded)
            # A checkpoint of the run folder has what all ranks have not sent.
            if self._carried_state is not None and not (loaded.unsent or loaded.velocities):
                restore_local_state(self.bucketed_exchange, self._carried_state)
            self._carried_state = None


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all values are finite, in one pass through memory: a sum that overflows counts as not finite."""
    sums = []
    for gradient in gradients:
        dense = gradient._values() if gradient.is_sparse else gradient
        values = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
        sums.append(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).double())
    # One trip from a GPU for all.
    return not sums or bool(torch.isfinite(torch.stack([total.to(sums[0].device) for total in sums])).all())
