"""A training step of a model in stages (--stages): a replica's ranks have the same examples and parts of the model.

start_step, accumulate_gradients   micro-batches are collected; after the last one they pass the stages, and a bucket is
                                   sent over the column as soon as the last one has gone back through its layers
all_reduce                         sums of the columns; what two stages share; the norm over all stages
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.comm.grid import find_replica_group
from hvdtrain.comm.uneven import gather_on_root
from hvdtrain.comm.world import World
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.framework import Split, StepResult
from hvdtrain.recipe.shares import even_shares
from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count
from hvdtrain.torch.broadcast import broadcast_optimizer
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.division import Division, find_stages, refuse_recipe
from hvdtrain.torch.pipeline import MicroBatch, Pipeline
from hvdtrain.torch.recompute import explain_recompute_errors
from hvdtrain.torch.sandbox import preserve_random_state
from hvdtrain.torch.scores import sum_scores, weigh_loss
from hvdtrain.torch.setup import explain_nondeterminism
from hvdtrain.torch.shard_trial import try_units
from hvdtrain.torch.stage_gradients import StageGradients, connect_holders
from hvdtrain.torch.stage_state import WholeModel, join_stage_states, split_state
from hvdtrain.torch.stages import keep_modules, keep_parameters
from hvdtrain.torch.stand_in import StandIn
from hvdtrain.torch.step import TorchStep
from hvdtrain.torch.sums import StepSums
from hvdtrain.torch.tensors import read_tensors, write_tensors
from hvdtrain.torch.trial import TrialResult

NUM_FLAGS = 3  # of changes: parameters, learning rates, buffers


class PipelineStep(TorchStep):
    """`TorchStep` with stages.

    Attributes:
        division: of the model.
        pipeline: this rank's stages.
        gradients: what the ranks of the replica do together with gradients.
        whole: what the model and its optimizer have on all ranks of the replica together.
    """

    division: Division
    pipeline: Pipeline
    gradients: StageGradients
    whole: WholeModel

    def divide_into_stages(self, trial: TrialResult) -> None:
        """Find the stages with all ranks, and take other ranks' modules out of the model and the optimizer.

        Raises UserError, on all ranks, for what stages cannot do exactly.
        """
        options, world = self.options, self.world
        collectives.on_all_ranks("pipeline.recipe", lambda: self._refuse_recipe(trial))
        size = self._find_micro_batch()
        shared = [*self.splits.datasets.values(), *self.updater.optimizers.values()]
        self.division = find_stages(self.scorer, self.model, self.splits, shared, options, size)
        (loss,) = self.updater.losses
        broadcast_optimizer(loss.optimizer)
        collectives.on_all_ranks("pipeline.optimizer", lambda: self._try_optimizer(loss.optimizer))
        self.whole = WholeModel.of(self.model, loss.optimizer)
        stages = options.pipeline.stages
        own = self.division.list_own(world.place, stages)
        keep_modules(self.model, [link.name for stage in own for link in stage.links])
        keep_parameters(loss.optimizer, self.model)
        self.gradients = StageGradients(self.device)
        loss.settings = replace(loss.settings, stages=self.gradients)
        # A parameter that several of this rank's stages have gets its gradient in several parts.
        several = [p for stage in own for p in {id(p): p for p in self._list_parameters(stage)}.values()]
        self._sends_late = options.pipeline.kind == "zerobubble" or len({id(p) for p in several}) < len(several)
        self._enter_replica()

    def _find_micro_batch(self) -> int:
        """Return the most examples of a micro-batch in this world."""
        return self.options.find_pass_sizes(self.recipe.batch_size, even_shares(self.world.data_size)).training

    def _enter_replica(self) -> None:
        """Prepare the stages for this world, of whose replicas each has its part of the batch."""
        world, options, size = self.world, self.options.pipeline, self._find_micro_batch()
        count = options.count_micro_batches(-(-self.recipe.batch_size // world.data_size), size)
        division = self.division.resize(size)
        own = division.list_own(world.place, options.stages)
        self.pipeline = Pipeline(options.kind, own, division.stages[-1].returned, self.scorer, count)
        self.pipeline.on_backward = self._announce_pass
        self._collected: list[MicroBatch] = []  # of the step
        if self._is_connected:
            named = {self.whole.first_names[name]: p for name, p in self.model.named_parameters()}
            self.gradients.set_shared(connect_holders(self.division.shared, named, world.place, options.stages))
            self.updater.log_lines.append(
                f"stages    {options.kind}, {format_count(world.data_size, 'replica')} x {options.stages} ranks, "
                f"{count} micro-batches of {size}: {self.division.text}"
            )

    @property
    def _is_connected(self) -> bool:
        """Whether the other ranks are there; in an elastic run they are met once each is prepared."""
        return collectives.size() == self.world.size

    def _try_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError for an optimizer whose update of a parameter depends on others."""
        with preserve_random_state():
            torch.manual_seed(0)
            try_units(optimizer, type(self.recipe).__name__, self.options.pipeline.flag)

    def _list_parameters(self, stage: Any) -> list[torch.nn.Parameter]:
        return [p for link in stage.links for p in self.model.get_submodule(link.name).parameters()]

    def _refuse_recipe(self, trial: TrialResult) -> None:
        if not self._is_connected and not is_overridden(self.recipe, "stages"):
            raise UserError(
                f"--stages in an elastic run: ranks join at any time and cannot measure together where to cut; write "
                f"{type(self.recipe).__name__}.stages(self, model), which returns the names of the modules "
                "after which to cut"
            )
        refuse_recipe(self.recipe, self.updater.several, self.source, trial)

    # A training step.

    def _make_sums(self) -> StepSums:
        # Stages have other buffers: one flag is for all of them.
        return StepSums(self.recipe, self.layout, NUM_FLAGS, self.options.exchange, self.device)

    @explain_nondeterminism
    def accumulate_gradients(self, batch: Any, count: int, weight: float, seed: Sequence[int]) -> None:
        self._collected.append(MicroBatch(batch, count, seed))
        if len(self._collected) == self._num_micro_batches:
            micro_batches, self._collected = self._collected, []
            self._run_pipeline(micro_batches, weight)

    @explain_recompute_errors
    def _run_pipeline(self, micro_batches: Sequence[MicroBatch], weight: float) -> None:
        def compute_loss(micro_batch: MicroBatch, model: StandIn) -> Tensor:
            scores = self.scorer.score_for_training(model, micro_batch.batch, self.layout, micro_batch.count)
            self.sums.add_scores(scores)
            return weigh_loss(scores["loss"], weight)

        self.pipeline.train(self.model, micro_batches, compute_loss)
        exchange = self.updater.losses[0].bucketed_exchange
        if self._sends_late and exchange is not None:
            exchange.collect_gradients()

    def _announce_pass(self, is_last: bool) -> None:
        if (exchange := self.updater.losses[0].bucketed_exchange) is not None:  # there are several replicas
            exchange.announce_pass(is_last and not self._sends_late)

    def _collect_flags(self) -> list[float]:
        changed, rates, *buffers = self.changes.collect_change_flags(self.updater.param_groups)
        return [changed, rates, max(buffers)]

    def all_reduce(self) -> StepResult:
        self.sums.start_all_reduce(self._votes, self._collect_flags(), self.world.size, self.world.counts_examples)
        self.updater.wait_for_sums()
        totals = self._await_totals()
        self.updater.set_sums_finite(self.gradients.agree(self.updater.sums_are_finite))
        nonfinite = self.updater.reduce_gradients(totals)
        if not self.gradients.agree(not nonfinite):
            found = collectives.gather_json(nonfinite, "pipeline.nonfinite")
            nonfinite = tuple(dict.fromkeys(name for names in found for name in names))
        self._check_changes(totals.change_flags)
        waited = self._waited + self.updater.waited + (self.pipeline.waited if self._num_micro_batches else 0.0)
        return totals.make_result(nonfinite, bool(self.sums.nonfinite_here), waited)

    def _check_changes(self, flags: Sequence[float]) -> None:
        """Raise UserError for what `score` or a forward pass has changed. flags: summed over ranks."""
        if flags[1]:
            raise self.changes.learning_rate_watch.build_error()
        if flags[0] or flags[2]:
            what = "a parameter" if flags[0] else "a buffer"
            raise UserError(
                f"--stages: {type(self.recipe).__name__}.score or the model's forward changes {what}, which stages of "
                "other replicas would not have alike; leave out --stages"
            )

    # Between steps.

    @explain_nondeterminism
    def evaluate_batch(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        self._evaluation_seed = seed
        with torch.no_grad():
            model = self.evaluator.enter_evaluation()
            stand_in = self.pipeline.evaluate(model, MicroBatch(batch, count, seed))
        if stand_in is None:
            return np.zeros(self.layout.num_sums)
        seed_all(seed)
        scores = self.scorer.score_for_evaluation(stand_in, batch, self.layout, count)
        return sum_scores(scores, self.layout).cpu().numpy()

    def join_evaluation(self, split: Split) -> None:
        pass  # of no rank of the replica there are examples

    def compute_outputs(self, batch: Any, count: int) -> Mapping[str, NDArray[Any]]:
        """Return the outputs that `score` has returned, where the scores are; or what all ranks compute together."""
        if self.gradients.agree(self.scorer.has_outputs or not self.pipeline.has_last):
            return self.scorer.compute_outputs(None, batch, count) if self.pipeline.has_last else {}
        model, seed = self.evaluator.enter_evaluation(), (*self._evaluation_seed, 0)
        seed_all(seed)
        stand_in = StandIn(
            self.recipe, lambda args: self.pipeline.call_model(model, args, seed), training=False, method="outputs"
        )
        return self.scorer.compute_outputs(stand_in, batch, count)

    def evaluated_model(self, seed: Sequence[int]) -> NoReturn:
        raise NotImplementedError  # `evaluated` is refused

    def trace_graph(self) -> bytes | None:
        return None

    def gather_state(self) -> bytes:
        carried = self._prepare_to_save()
        data = collectives.on_all_ranks("pipeline.state", lambda: self.state.serialize(carried))
        if self.world.replica != 0:
            return b""
        parts = gather_on_root(data, "pipeline.parts", find_replica_group())
        return write_tensors(join_stage_states([read_tensors(part) for part in parts], self.whole)) if parts else b""

    def load_state(self, data: bytes) -> None:
        state = read_tensors(data, torch.device("cpu"))
        if state["model"].keys() != self.model.state_dict().keys():  # of all stages
            data = write_tensors(split_state(state, self.whole, self.model))
        super().load_state(data)

    def switch_world(self, world: World) -> None:
        super().switch_world(world)
        self._enter_replica()
