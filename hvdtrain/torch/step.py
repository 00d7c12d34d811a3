"""A training step in torch: gradients of micro-batches, their exchange, the update, the evaluation and the state.

accumulate_gradients     forward ........ backward ............    all_reduce       apply_update
  of the last            |                |  a bucket is full:     |                |
  micro-batch            v                v  it is sent            v                v
on the wire              [sums and votes] [bucket] [bucket] ..     wait for all     clip, optimizer, EMA
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import check_agreement
from hvdtrain.comm.grid import find_batch_group
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.framework import Chunk, RoundResult, Split, StepResult, StepVotes
from hvdtrain.recipe.now import foresee_first_step, set_now, temporary_now
from hvdtrain.recipe.order import Ids
from hvdtrain.recipe.shares import Shares
from hvdtrain.torch.buffers import BufferMode, resolve_buffer_modes
from hvdtrain.torch.changes import ChangeTracker
from hvdtrain.torch.consistency import agree_on_parts, metrics_part, select_examples, select_split_hashes
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.divided_model import divide_model
from hvdtrain.torch.evaluator import Evaluator
from hvdtrain.torch.gpu import find_gpu_uuid
from hvdtrain.torch.modes import TrainingModes
from hvdtrain.torch.part_exchange import make_part_exchange
from hvdtrain.torch.process import ProcessSettings
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recipe_state import RecipeState
from hvdtrain.torch.recompute import recompute_blocks
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.scores import Scores
from hvdtrain.torch.served import ServedPart
from hvdtrain.torch.setup import build_model, choose_device, configure_torch, explain_nondeterminism, load_datasets
from hvdtrain.torch.sharded_ema import make_average
from hvdtrain.torch.splits import SplitLoaders
from hvdtrain.torch.state import TrainingState
from hvdtrain.torch.step_facts import StepFacts
from hvdtrain.torch.sums import StepSums, StepTotals
from hvdtrain.torch.table_state import take_table_rows
from hvdtrain.torch.table_trial import check_row_updates
from hvdtrain.torch.tables import deal_recipe_tables, describe_tables
from hvdtrain.torch.trial import TrialResult, initialize_lazy_modules, load_two_examples, prepare_trial
from hvdtrain.torch.update import Updater
from hvdtrain.torch.watch import reject_scheduler


class TorchStep(StepFacts, ServedPart):
    """`hvdtrain.recipe.framework.Step` for a torch recipe.

    Attributes:
        splits: the datasets and what loads them.
        scorer: calls the recipe's `score`.
        updater: the optimizer, and the exchange of gradients that it does.
        changes: what a step changes besides the optimizer's update: buffers, modes, learning rates.
        state: all of this that is saved, with what the recipe remembers, `recipe_state`.
        sums: the scores and votes that are summed over ranks.
        ema: the averaged model of --ema, if there is one.
        forward: the model as it is called, compiled with --compile.
        divided: the model, if ranks hold it together.
        evaluator: the model in evaluations.
    """

    def __init__(self, recipe: Recipe, world: World, options: StepOptions) -> None:
        """Prepare training with all other ranks: data, model, what has to be the same, a trial, the exchange.

        Raises UserError, RecipeError: on all ranks alike, for a recipe that cannot be trained; the process is then as
        it was before.
        """
        self.recipe, self.world, self.options, self.recipe_state = recipe, world, options, RecipeState(recipe)
        with contextlib.ExitStack() as undo:
            undo.callback(ProcessSettings().restore_settings)
            configure_torch(options, options.resolve_threads(world.local_size).count)
            self.device = choose_device(options.device.device, world.local_rank)
            self.gpu_uuid = find_gpu_uuid(self.device)
            self.scorer = Scorer(recipe, self.device, options)
            undo.callback(self.scorer.close)
            self.splits = SplitLoaders(recipe, load_datasets(recipe, world, options.data.seed), options.data, world)
            undo.callback(self.splits.close)
            self.examples, self.source = self.splits.num_examples, self.splits.source
            self.has_sampler = self.splits.has_sampler
            first_step = foresee_first_step(recipe, options.data, self.examples["train"])
            with temporary_now(recipe, first_step):
                collectives.on_all_ranks("examples", self.splits.check_splits)
            self.model = build_model(recipe, self.device, options)
            modes = TrainingModes(self.model)
            with temporary_now(recipe, first_step), self.scorer.session.record_pass():
                initialize_lazy_modules(recipe, self.model, lambda: load_two_examples(self.scorer, self.splits))
            self.tables = undo.enter_context(deal_recipe_tables(recipe, self.model, world, options, self.scorer))
            recompute_lines = undo.enter_context(recompute_blocks(recipe, self.model, options))
            self.divided = divide_model(recipe, self.model, self.source, options, self.device, world)
            buffer_modes = resolve_buffer_modes(type(recipe).__name__, recipe.buffers, self.model)
            self.updater = Updater(recipe, self.model, self.device, options, self.tables)
            undo.callback(self.updater.close)
            set_now(recipe, first_step)
            reject_scheduler(recipe, self.updater.optimizers.values())
            self.agreement_parts = parts = agree_on_parts(self.device, self.splits, self.model, self.updater.optimizers)
            self.first_examples: Mapping[str, str] = select_split_hashes(select_examples(parts), "train")
            self._trial = prepare_trial(self.scorer, self.divided, self.splits, self.updater)
            trial = self._trial.run()
            self.layout, self.trial_means = trial.layout, trial.means
            self.score_uses_collectives = trial.calls_collectives
            self.scorer.session.record = trial.exchanges
            self.score_needs_whole_batch = trial.exchanges.exchanges_examples
            parts.append(metrics_part(self.layout, trial.exchanges.describe_calls()))
            check_agreement("agreement.metrics", parts[-1:])
            self.divided.broadcast_parameters()
            self.divide_into_stages(trial)
            self._enter_first_world(world)
            self.forward: Any = torch.compile(self.model) if options.optimization.compile else self.model
            self.changes = self._track_changes(modes, buffer_modes, trial.changed_buffers)
            self.evaluator = Evaluator(self.scorer, self.divided, self.forward, self.ema, self.changes, self.layout)
            collectives.on_all_ranks("recipe_state", self.recipe_state.collect_values)
            self.state = TrainingState(self.recipe_state, self.divided, self.updater, self.ema, self.changes)
            self.sums = self._make_sums()
            self._messages = self.updater.log_lines
            self._messages += [*modes.get_warnings(), *recompute_lines, *self.divided.lines]
            self._votes, self._batch_share, self._num_micro_batches, self._micro_batches_done = StepVotes(), 0.0, 0, 0
            self._step_in_progress, self.update_in_progress, self._is_local = False, False, False
            # Once for the run: after what the recipe sets up, before connections that the processes would keep open.
            self.splits.start_workers()
            self._exit_stack = undo.pop_all()

    def divide_into_stages(self, trial: TrialResult) -> None:
        """Keep this rank's part of the model, if it is to have no more; the trial has had the whole one."""

    def _make_sums(self) -> StepSums:
        return StepSums(self.recipe, self.layout, self.changes.num_change_flags, self.options.exchange, self.device)

    def _enter_first_world(self, world: World) -> None:
        """Have rank 0's state of the optimizers, or this rank's part of it, and of tables and averages."""
        check_row_updates(type(self.recipe).__name__, self.updater.optimizers.values(), self.tables)
        self.updater.join_world(world)
        self.updater.distribute_state(world, is_first=True)
        take_table_rows(self.tables, self.updater.optimizers.values())
        self.updater.log_lines += describe_tables(self.tables)
        self.ema = make_average(self.divided, self.options.optimization.ema, self.updater.shards)
        self.parts = make_part_exchange(self.updater, self.ema)

    def _track_changes(
        self, modes: TrainingModes, buffer_modes: Mapping[str, BufferMode], changed_buffers: Sequence[str]
    ) -> ChangeTracker:
        name, deterministic = type(self.recipe).__name__, self.options.exchange.deterministic
        changes = ChangeTracker(name, self.model, modes, buffer_modes, self.world.size, deterministic)
        changes.buffer_reducer.group = find_batch_group(self.world)
        changes.buffer_reducer.expect_changes(changed_buffers)
        changes.learning_rate_watch.set_baseline(self.updater.param_groups)
        return changes

    # A training step.

    def deal_batch(self, shares: Shares) -> None:
        self.updater.deal_shards(shares)

    def load_batches(self, split: Split, chunks: Iterable[Chunk], epoch: int) -> Iterator[tuple[Ids, Any]]:
        self.evaluator.prepare_split(split)
        return self.splits.load_batches(split, chunks, epoch)

    def start_step(self, passes: Sequence[int], batch_share: float, is_local: bool = False, joined: int = 0) -> None:
        self.recipe_state.snapshot()
        self.evaluator.leave_evaluation()
        joined, passes = joined + sum(passes), self.divided.pad_passes(passes)
        self.updater.start_step(passes, is_local)
        self.sums.start_step(passes, self.updater.first_shard, is_local)
        self.scorer.session.start_step()
        self._totals: StepTotals | None = None  # of all ranks, once they are known
        self._waited, self._num_micro_batches, self._micro_batches_done = 0.0, sum(passes), 0
        self._batch_share = batch_share
        self._joined_passes = joined - sum(passes)
        self._step_in_progress, self._is_local = True, is_local
        self.changes.start_step()

    def cast_votes(self, votes: StepVotes) -> None:
        self._votes = votes

    @explain_nondeterminism
    def accumulate_gradients(self, batch: Any, count: int, weight: float, seed: Sequence[int]) -> None:
        seed_all(seed)
        scores = self.scorer.score_for_training(self.forward, batch, self.layout, count)
        self.sums.add_scores(scores)
        self._add_gradients(scores, weight)

    def _add_gradients(self, scores: Scores, weight: float) -> None:
        self.divided.check_graph(scores)
        self._micro_batches_done += 1
        is_last = self._micro_batches_done == self._num_micro_batches
        if is_last:  # the forward passes are over: sums and buffers travel while backward computes
            self._start_small_all_reduces()
            if self.layout.several:  # first, whether all ranks exchange gradients of the same losses
                self._totals = self._await_totals()
        self.updater.backward(scores, weight, last=is_last)

    def _start_small_all_reduces(self) -> None:
        flags = self.changes.collect_change_flags(self.updater.param_groups)
        self.sums.start_all_reduce(self._votes, flags, self.world.size, self.world.counts_examples)
        if self.world.size > 1:
            self.changes.buffer_reducer.start_combining(self._batch_share)

    def all_reduce(self) -> StepResult:
        while self._micro_batches_done < self._num_micro_batches:  # others of the replica have more examples
            batch, count = self._trial.spare_batch
            self._add_gradients(self.scorer.score_for_training(self.forward, batch, self.layout, count), 0.0)
        if self._num_micro_batches == 0:
            self._start_small_all_reduces()
        for _ in range(self._joined_passes):
            self.scorer.session.join_pass(self.device)
        if self._num_micro_batches == 0:
            self._totals = self._await_totals() if self.layout.several else None
        self.updater.wait_for_sums()
        totals = self._totals or self._await_totals()
        nonfinite_gradients = self.updater.reduce_gradients(totals)
        waited = self._waited + self.scorer.session.waited
        begin = time.perf_counter()
        self.changes.reconcile_changes(totals.change_flags, self._num_micro_batches, self.options.rounds.local_steps)
        if self.world.size > 1:
            waited += self.updater.waited + time.perf_counter() - begin
        self._messages += self.changes.buffer_reducer.take_warnings()
        self.updater.check_losses_train(lambda name: self.layout.numerator(totals.scores, name))
        return totals.make_result(nonfinite_gradients, bool(self.sums.nonfinite_here), waited)

    def _await_totals(self) -> StepTotals:
        """Wait for the sums and votes of all ranks, and select the losses that the step has."""
        self._waited += self.sums.wait()
        self.updater.select_losses((totals := self.sums.read_totals()).losses)
        return totals

    def apply_update(self, factor: float, seed: Sequence[int]) -> dict[str, float]:
        seed_all(seed)  # what an optimizer draws is the same on all ranks
        self._step_in_progress, self.update_in_progress = False, True
        try:
            report = self.updater.clip_and_step(factor)
        except Exception:
            self._step_in_progress, self.update_in_progress = self.updater.can_undo, not self.updater.can_undo
            raise
        if self.ema is not None and not report.get("skipped") and not self._is_local:
            self.ema.update_parameters(self.model)
        self.changes.accept_update(self.updater.param_groups)
        self.recipe_state.forget_snapshot()
        self.update_in_progress = False
        return report

    def end_round(self) -> RoundResult:
        result = self.updater.rounds.exchange_changes()
        self.update_in_progress = True
        self.updater.rounds.step_outer()
        if self.ema is not None:
            self.ema.update_parameters(self.model, result.steps)
        self.changes.accept_update(self.updater.param_groups)
        self.update_in_progress = False
        return result

    def skip_update(self) -> None:
        self._step_in_progress = False
        self.recipe_state.forget_snapshot()
        self.changes.skip_step()

    def prune(self, sparsity: float) -> float:
        pruned = self.updater.prune(sparsity, None if self.ema is None else self.ema.module)
        self.changes.accept_update(self.updater.param_groups)
        return pruned

    # Between steps.

    def gather_state(self) -> bytes:
        carried = self._prepare_to_save()
        self.state.gather_shards()
        return self.state.serialize(carried) if self.world.rank == 0 else b""

    def _prepare_to_save(self) -> dict[str, object] | None:
        """Put the model into the state of a training; return what the exchange carries. All ranks call it."""
        self.recipe_state.forget_snapshot()
        self.evaluator.leave_evaluation()
        return self.updater.gather_carried_state()

    def local_state(self) -> bytes:
        return self.state.serialize_anchor()

    def rejoin_round(self, data: bytes) -> None:
        self._messages += self.state.rejoin_round(data, self.device)

    def load_state(self, data: bytes) -> None:
        self.evaluator.leave_evaluation()
        self._messages += self.state.restore(data, self.device)
        self.update_in_progress = False

    # Another world; the end.

    def switch_world(self, world: World) -> None:
        self.recipe_state.keeps_snapshots = True
        self.recipe_state.restore_snapshot()
        self.parts.leave_world(is_lost=self.update_in_progress)
        if self._step_in_progress:
            self.skip_update()
            self.updater.rounds.undo_step()
        self.updater.leave_world()
        self.sums.forget_all_reduce()
        self.world = world
        self.evaluator.enter_world(world)
        self.updater.join_world(world)
        self.updater.distribute_state(world, is_first=False)
        self.parts.join_world(world)
        self._messages += describe_tables(self.tables)

    def exchange_parts(self, reached: int, step: int) -> str | None:
        lost = self.parts.exchange_parts(reached, step)
        self.changes.parameter_watch.set_baseline()
        return lost

    def close(self) -> None:
        """Leave the recipe's model and optimizer, and this process, as they would be without hvdtrain's hooks."""
        self._exit_stack.close()
