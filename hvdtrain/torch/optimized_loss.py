"""One loss and the optimizer that minimizes it: gradients are exchanged, checked, clipped and applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hvdtrain.comm.grid import find_gradient_group
from hvdtrain.comm.world import World
from hvdtrain.compression.spec import parse_compression, select_layers
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.sharded import ShardedExchange
from hvdtrain.system.seeds import derive_seed
from hvdtrain.torch.broadcast import broadcast_optimizer
from hvdtrain.torch.carried_state import CarriedState
from hvdtrain.torch.gradient_watch import GradientWatch
from hvdtrain.torch.groups import explain_closure_error
from hvdtrain.torch.hierarchy import connect_round_order
from hvdtrain.torch.hyperparameters import ParamGroup, get_hyperparameters
from hvdtrain.torch.local_parts import LocalParts, make_local_parts
from hvdtrain.torch.loss_state import LossState
from hvdtrain.torch.optimizer import DistributedOptimizer, unwrap_optimizer
from hvdtrain.torch.optimizer_methods import WrappedOptimizer
from hvdtrain.torch.piece_owner import PieceOwner, use_pieces
from hvdtrain.torch.readable import check_readable
from hvdtrain.torch.setup import check_momentum
from hvdtrain.torch.shard_update import step_pieces
from hvdtrain.torch.sharding import OptimizerSharding
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.tensors import all_finite, scale_tensors
from hvdtrain.torch.update_settings import UpdateSettings


class OptimizedLoss(LossState):
    """A score that is minimized by an optimizer of its own.

    A step is `start_step`, `backward` for each micro-batch, `wait_for_sums`, `reduce_gradients`, and `clip_and_step`
    unless a sum is not finite; or `start_step` and `leave_out`. In a local step gradients stay on this rank.

    Attributes:
        name: of the score.
        optimizer: the recipe's, wrapped.
        bucketed_exchange, shard_exchange: its exchange, if it is the one or the other.
        sharding: how the optimizer is divided, if it is.
        local_parts: what this rank has of the parameters, if the model is divided among ranks.
        carried: what the exchange carries from step to step.
        gradient_watch: refuses a loss that trains nothing.
        steps: how often it has exchanged something in this process.
        gradient_factor: of the step's gradients once they are exchanged and unscaled: examples / own denominators.
        base_lrs: each group's learning rate, before the schedule.
        hyperparameters: what each group was given.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, settings: UpdateSettings) -> None:
        self.name, self.settings = name, settings
        self.optimizer = cast(WrappedOptimizer, optimizer)  # as soon as a world is joined
        self.column_suffix = f"_{name.removeprefix('loss_')}" if settings.several else ""
        self.bucketed_exchange: BucketedExchange | None = None
        self.shard_exchange: ShardedExchange | None = None
        self.sharding = OptimizerSharding(settings, f"{name}." if settings.several else "")
        self.local_parts: LocalParts | None = None
        self.carried = CarriedState()
        self.steps, self.gradient_factor = 0, 1.0
        self._is_local = self._state_checked = self._has_joined = False  # the step; once; a world, now or before
        self.base_lrs: list[float] = []
        self.hyperparameters: list[ParamGroup] = []
        own = " of its own optimizer" if settings.several else ""
        self.gradient_watch = GradientWatch(settings.recipe_name, name, own)
        self._gradient_norm: Tensor | None = None  # of the step's gradients, if they are to be clipped
        self._step_parameters: list[nn.Parameter] = []  # when it began

    # The world.

    def join_world(self, world: World, log_line: Callable[[str], object]) -> None:
        """Exchange gradients with the ranks of a world; after another one, once `leave_world` was called."""
        options, first = self.settings.options, not self._has_joined
        if first:
            check_momentum(parse_compression(options.compression.spec), self.optimizer, world, options)
            self.sharding.try_optimizer(self.optimizer, world)
            self.local_parts = make_local_parts(self.optimizer, self.settings)
        held = set(self.get_parameters())
        named = [(name, p) for name, p in self.settings.model.named_parameters() if p in held]
        compression, seed, index = options.compression.spec, options.data.seed, self.settings.losses.index(self.name)
        compression = select_layers(compression, [name for name, _ in named]) if self.settings.several else compression
        wrapped = DistributedOptimizer(
            self.optimizer,
            named,
            average=False,
            exchange=options.exchange.kind,
            bucket_bytes=options.exchange.bucket_bytes,
            shards=options.exchange.num_shards,
            compression=compression,
            seed=derive_seed(seed, index) if index else seed,
            name=f"{self.name}." if self.settings.several else "",
            process_set=find_gradient_group(world),
            round_order=connect_round_order(self.settings, world, self.name, log_line),
            left_out=set(self.settings.tables.parameters.values()) if self.settings.tables is not None else (),
        )
        self.optimizer = cast(WrappedOptimizer, wrapped)
        self._adopt_exchange(self.optimizer.exchange, log_line)
        if first:
            self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
            self.hyperparameters = get_hyperparameters(self.optimizer.param_groups)
            self._has_joined = True
            with use_pieces(self.local_parts):
                check_readable(self.optimizer.state_dict(), "the optimizer's state")

    def _adopt_exchange(
        self, exchange: BucketedExchange | ShardedExchange | None, log_line: Callable[[str], object]
    ) -> None:
        self.bucketed_exchange = exchange if isinstance(exchange, BucketedExchange) else None
        self.carried.exchange = self.bucketed_exchange
        self.shard_exchange = exchange if isinstance(exchange, ShardedExchange) else None
        if exchange is not None:
            clips = self.settings.options.optimization.clip_norm is not None
            exchange.checks_finite = self.settings.scaler is None and (self.settings.several or not clips)
        if self.bucketed_exchange is not None and self.bucketed_exchange.advisor is not None:
            self.bucketed_exchange.advisor.log_line = log_line
        self.leave_out_pruned()

    def leave_out_pruned(self) -> None:
        """Let gradients of the weights that are pruned now not travel any more."""
        if self.bucketed_exchange is not None and self.settings.pruner is not None:
            self.bucketed_exchange.leave_out(self.settings.pruner.masks)

    def distribute_state(self, world: World, *, is_first: bool) -> list[str]:
        """Have rank 0's state, in the first world, or this rank's part of it; return lines to print; on all ranks."""
        if is_first and self.local_parts is None and self.settings.stages is None:  # of which each rank has its own
            broadcast_optimizer(self.optimizer)
        return self.sharding.divide(self.optimizer, self.bucketed_exchange, world)

    @property
    def shards(self) -> OptimizerShards | None:
        """This rank's part of the optimizer; None if every rank has all of it."""
        return self.sharding.shards

    @property
    def _scattered(self) -> PieceOwner | None:
        """What has this rank's part of the optimizer, if each rank has its part of the gradients only."""
        return self.local_parts or (self.shards if self.bucketed_exchange is not None else None)

    def leave_world(self) -> None:
        """Leave the exchange of a world; what it has not sent is kept for the next."""
        self.carried.keep()
        self.close()

    def close(self) -> None:
        """Give the recipe's optimizer and its parameters back as they were before `join_world`."""
        if self.shards is not None:
            self.shards.forget_state()
        if hasattr(type(self.optimizer), "inner_class"):
            unwrap_optimizer(self.optimizer)

    # A step.

    def get_parameters(self) -> list[nn.Parameter]:
        """Return the optimizer's parameters, without waiting for gradients."""
        own = vars(self.optimizer)  # the property of the wrapped optimizer waits for gradients
        return [p for group in own.get("param_groups") or self.optimizer.param_groups for p in group["params"]]

    def collect_gradients(self) -> list[Tensor]:
        """Return the gradients that there are."""
        return [p.grad for p in self.get_parameters() if p.grad is not None]

    def start_step(self, passes: Sequence[int], is_local: bool) -> None:
        """Drop the last step's gradients.

        Args:
            passes: the backward passes of each of this rank's shards.
            is_local: whether gradients stay on this rank.
        """
        self._is_local, self.optimizer.waited = is_local, 0.0
        if self.local_parts is not None:
            self.local_parts.drop_gradients()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.set_backward_passes_per_step(sum(passes))
        self._step_parameters = self.get_parameters()
        if self.shard_exchange is not None:
            self.shard_exchange.start_exchange(passes)

    def leave_out(self) -> None:
        """Take no part in the step that was started: parameters, state and residuals stay as they are."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, objective: Tensor, last: bool, keep_graph: bool) -> None:
        """Add the gradient of an objective, if it has one, and start exchanging what is ready in the last pass.

        Args:
            objective: (), scaled as the gradients are to be.
            last: whether this is the step's last micro-batch on this rank.
            keep_graph: whether other losses of the micro-batch follow, which may share its graph.
        """
        if self.bucketed_exchange is not None:
            self.bucketed_exchange.announce_pass(last and not self._is_local)
        if objective.requires_grad and not self.settings.several:
            objective.backward()  # type: ignore[no-untyped-call]
        elif objective.requires_grad:
            trained = [p for p in self._step_parameters if p.requires_grad]
            if trained:
                torch.autograd.backward(objective, inputs=trained, retain_graph=keep_graph)
        if self.shard_exchange is not None:
            self.shard_exchange.end_backward_pass()

    def wait_for_sums(self) -> bool:
        """Wait for the gradients' sums over ranks; return whether they are finite, if their exchange looks."""
        finite, tables = True, self.settings.tables
        if self.bucketed_exchange is not None and not self._is_local:
            self.bucketed_exchange.wait_for_sums()
            finite = self.bucketed_exchange.sums_are_finite
        if tables is not None:
            tables.set_gradients()
            finite = tables.sum_squares() and finite
        return finite

    def reduce_gradients(self, is_made: bool) -> tuple[str, ...]:
        """Finish exchanging gradients; return the names of parameters whose sums over ranks are not finite.

        is_made: False if it is known that there will be no update.
        """
        if self._is_local:
            return ()  # the round looks itself
        if self.bucketed_exchange is not None:
            self.bucketed_exchange.step_is_made = is_made
        self.optimizer.synchronize()
        self.steps += 1
        if self.settings.stages is not None:
            self.settings.stages.sum_shared()
        if self.settings.pruner is not None and self.bucketed_exchange is None:  # whose sums are zero there
            self.settings.pruner.zero_gradients(self.get_parameters())
        if self._scattered is not None:
            self._scattered.take_gradients()
        if self.settings.scaler is not None:
            return ()  # which skips such steps itself
        exchange = self.optimizer.exchange
        if self._scattered is not None:
            self._gradient_norm = self._scattered.total_norm()
        elif self.settings.tables is not None:
            self._gradient_norm = self.settings.tables.total_norm(self.get_parameters())
        elif self.settings.options.optimization.clip_norm is not None:
            self._gradient_norm = self.settings.compute_norm(self.get_parameters())
        if self._gradient_norm is not None:
            finite = bool(torch.isfinite(self._gradient_norm))
        else:
            finite = exchange.sums_are_finite if exchange is not None else all_finite(self.collect_gradients())
        if finite:
            return ()
        names = {p: name for name, p in self.settings.model.named_parameters()}
        own = (p for p in self.get_parameters() if p.grad is not None and not all_finite([p.grad]))
        nonfinite = set(own) if self._scattered is None else self._scattered.find_nonfinite()
        if self.settings.tables is not None:
            found = self.settings.tables.find_nonfinite()
            nonfinite |= {p for p, name in names.items() if name in found}
        return tuple(names[p] for p in self.get_parameters() if p in nonfinite) or ("the sum",)

    def check_loss_trains(self, loss: float) -> None:
        """Raise UserError if the sum of the step's losses over all ranks has depended on no parameter so far."""
        has_gradient = bool(self.collect_gradients()) or self.settings.tables is not None
        has_gradient |= self._scattered is not None and self._scattered.has_gradients
        self.gradient_watch.check_gradient(loss, has_gradient)

    def set_learning_rates(self, factor: float) -> None:
        """Set each group's learning rate to `factor` times what it was before the schedule."""
        groups = self.optimizer.param_groups
        self.base_lrs += [float(group["lr"]) for group in groups[len(self.base_lrs) :]]  # added since
        for group, lr in zip(groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor

    def clip_and_step(self) -> dict[str, float]:
        """Unscale, clip, and step; return what is to be reported."""
        with use_pieces(self._scattered):
            report = self._scale_and_clip()
        with step_pieces(self.shards), use_pieces(self.local_parts):
            if self.settings.scaler is None:
                self._step_optimizer()
            else:
                # The gradients are the same on all ranks, and so is the decision to skip.
                self.settings.scaler.step(self.optimizer)
        return report

    def _scale_and_clip(self) -> dict[str, float]:
        report: dict[str, float] = {}
        scaler, clip_norm = self.settings.scaler, self.settings.options.optimization.clip_norm
        if scaler is not None:
            scaler.unscale_(self.optimizer)
            if self._scattered is not None:
                self._gradient_norm = self._scattered.agree_on_overflow(scaler)
            elif (tables := self.settings.tables) is not None:
                self._gradient_norm = tables.agree_on_overflow(scaler, self.optimizer, self.get_parameters())
        if self.gradient_factor != 1:  # what compression has not sent stays as it was
            scale_tensors(self.collect_gradients(), self.gradient_factor)
        if clip_norm is not None:
            params = [p for p in self.get_parameters() if p.grad is not None]
            norm = self._gradient_norm
            if norm is None:
                norm = self.settings.compute_norm(self.get_parameters())
            elif self.gradient_factor != 1:
                norm = norm * self.gradient_factor
            nn.utils.clip_grads_with_norm_(params, clip_norm, norm)
            report[f"gradient_norm{self.column_suffix}"], self._gradient_norm = float(norm), None
        return report

    def _step_optimizer(self) -> None:
        if self._is_local:
            self.optimizer._synchronized = True  # as far as it will be
        with explain_closure_error(self.settings.recipe_name, self.optimizer):
            self.optimizer.step()
        if not self._state_checked:
            check_readable(self.optimizer.state_dict(), "the optimizer's state")
            self._state_checked = True
