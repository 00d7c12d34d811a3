"""A training step in torch: gradients of micro-batches, their exchange, the update, the evaluation and the state."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import check_agreement
from hvdtrain.comm.world import World
from hvdtrain.exchange.checksums import checksum_model
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.exchange.tensors import load_module_state, read_tensors
from hvdtrain.recipe.framework import TOLD, Ids, Split, StepResult
from hvdtrain.system.errors import RecipeError, UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.broadcast import broadcast_state
from hvdtrain.torch.buffers import resolve_buffer_modes
from hvdtrain.torch.changes import ChangeTracker
from hvdtrain.torch.data import seed_all, to_device
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.fingerprint import (
    EXAMPLES_INDEX,
    check_same_model,
    find_changed_hash,
    get_seeded_examples,
    metrics_part,
    select_split_hashes,
    step_parts,
)
from hvdtrain.torch.modes import TrainingModes
from hvdtrain.torch.process import ProcessSettings
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.scores import check_scores, sum_scores
from hvdtrain.torch.setup import choose_device, configure_torch, explain_nondeterminism, load_datasets, make_model
from hvdtrain.torch.splits import SplitLoaders
from hvdtrain.torch.stage import preserve_random_state
from hvdtrain.torch.trial import initialize_lazy_modules, reject_sync_batch_norm, run_trial, trace_model_graph
from hvdtrain.torch.update import Updater
from hvdtrain.torch.watch import reject_scheduler

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchStep:
    """`hvdtrain.recipe.framework.Step` for a torch recipe."""

    def __init__(self, recipe: Recipe, world: World, options: StepOptions) -> None:
        self.recipe, self.world, self.options = recipe, world, options
        self._score_needs_graph = False
        self._exit_stack = contextlib.ExitStack()
        self._exit_stack.callback(ProcessSettings().restore_settings)
        try:
            self._prepare_training()
        except BaseException:
            self.close()
            raise

    def _prepare_training(self) -> None:
        recipe, world, options = self.recipe, self.world, self.options
        configure_torch(options, options.resolve_threads(world.local_size).count)
        self.device = choose_device(options.device.device, world.local_rank)
        self.datasets = load_datasets(recipe, world, options.data.seed)
        self.splits = SplitLoaders(recipe, self.datasets, options.data)
        self._exit_stack.callback(self.splits.close)
        self.examples = self.splits.num_examples
        collectives.on_all_ranks("examples", self.splits.check_splits)

        seed_all([options.data.seed])
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = collectives.on_all_ranks("model", lambda: make_model(recipe)).to(self.device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=self.memory_format)
        modes = TrainingModes(self.model)
        reject_sync_batch_norm(self.model)
        initialize_lazy_modules(recipe, self.model, self._load_two_examples)
        name = type(recipe).__name__
        declared = resolve_buffer_modes(name, recipe.buffers, self.model)
        self.updater = Updater(recipe, self.model, self.device, options)
        self._exit_stack.callback(self.updater.close)
        self._messages = self.updater.log_lines
        examples, inner = get_seeded_examples(self.splits), self.updater.optimizer
        reject_scheduler(recipe, inner)
        self.agreement_parts = collectives.on_all_ranks(
            "agreement.parts", lambda: step_parts(self.device, examples, self.model, inner)
        )
        self.first_examples = select_split_hashes(self.agreement_parts[EXAMPLES_INDEX], "train")
        check_agreement("agreement.step", self.agreement_parts)
        self._messages += modes.get_warnings()
        shared, batch, count = (
            [*self.datasets.values(), inner],
            self._load_two_examples(),
            min(2, self.examples["train"]),
        )
        attempt = explain_nondeterminism(run_trial)
        trial = collectives.on_all_ranks(
            "trial", lambda: attempt(recipe, self.model, shared, batch, count, self._autocast_context())
        )
        self.metrics, self.score_uses_collectives = trial.metrics, trial.calls_collectives
        self.agreement_parts.append(metrics_part(self.metrics))
        check_agreement("agreement.metrics", self.agreement_parts[-1:])
        self.updater.join_world(world)
        broadcast_state(self.model, self.updater.optimizer)
        self.ema = AveragedModel(self.model, decay) if (decay := options.optimization.ema) is not None else None
        self.forward: Any = torch.compile(self.model) if options.optimization.compile else self.model
        self.changes = ChangeTracker(name, self.model, modes, declared, world.size, options.exchange.deterministic)
        self.changes.buffer_reducer.expect_changes(trial.changed_buffers)
        self.changes.learning_rate_watch.set_baseline(self.updater.optimizer.param_groups)
        # The scores, what the ranks tell each other, what has changed on a rank, and whether a loss is not finite.
        own = TOLD + self.changes.num_change_flags
        self._sums = torch.zeros(len(self.metrics) + own + 1, dtype=torch.float64, device=self.device)
        self._sums_handle: collectives.Handle | None = None
        self._nonfinite_here = torch.zeros((), dtype=torch.bool, device=self.device)
        self._num_micro_batches, self._micro_batches_done, self._batch_share, self._votes = 0, 0, 0.0, np.zeros(TOLD)
        self._step_in_progress = self.update_in_progress = False  # begun: a step that is not finished
        # Pinned: a GPU takes them from there without waiting.
        self._pinned_votes = torch.zeros(own, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        # Here, once for the run: what the recipe's methods have set up is there, and of an elastic run's other ranks no
        # connection yet that these processes would keep open.
        self.splits.start_workers()

    def find_changed_example(self, earlier: Mapping[str, str]) -> str | None:
        return find_changed_hash(self.agreement_parts[EXAMPLES_INDEX], earlier)

    def close(self) -> None:
        """Leave the recipe's model and optimizer, and this process, as they would be without hvdtrain's hooks."""
        self._exit_stack.close()

    def _load_two_examples(self) -> Any:
        with preserve_random_state():
            return to_device(self.splits.load_first_batch(2), self.device, self.memory_format)

    def _autocast_context(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.optimization.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.options.optimization.amp])

    def _call_score(self, model: Any, batch: Any) -> Any:
        with in_recipe(self.recipe, "score()"):
            return self.recipe.score(model, batch)

    def _score_for_evaluation(self, model: Any, batch: Any) -> Any:
        """Score without a graph, unless `score` takes derivatives itself, as of an energy."""
        if not self._score_needs_graph:
            try:
                with torch.no_grad():
                    return self._call_score(model, batch)
            except RecipeError as error:
                if "does not require grad" not in str(error):
                    raise
                self._score_needs_graph = True
        with torch.enable_grad():
            return self._call_score(model, batch)

    def load_batches(self, split: Split, chunks: Iterable[Ids], epoch: int) -> Iterator[tuple[Ids, Any]]:
        return self.splits.load_batches(split, chunks, epoch)

    def start_step(self, passes: Sequence[int], part: float, told: NDArray[np.float64]) -> None:
        self.updater.start_step(passes)
        self._sums.zero_()
        self._nonfinite_here.zero_()
        self._num_micro_batches, self._micro_batches_done, self._batch_share, self._votes = sum(passes), 0, part, told
        self._step_in_progress = True
        self.changes.start_step()

    @explain_nondeterminism
    def accumulate_gradients(self, batch: Any, count: int, weight: float, seed: Sequence[int]) -> None:
        seed_all(seed)
        with self._autocast_context():
            scores = self._call_score(self.forward, to_device(batch, self.device, self.memory_format))
        check_scores(self.recipe, scores, self.metrics, count)
        loss = scores["loss"]
        self._sums[: len(self.metrics)] += sum_scores(scores, self.metrics)
        self._nonfinite_here |= ~torch.isfinite(loss.detach()).all()
        self._micro_batches_done += 1
        if self._micro_batches_done == self._num_micro_batches:
            # The forward passes are over: sums and buffers travel while backward computes.
            self._start_small_all_reduces()
        objective = loss.to(torch.promote_types(loss.dtype, torch.float32)).sum() * weight
        self.updater.backward(objective, last=self._micro_batches_done == self._num_micro_batches)

    def _start_small_all_reduces(self) -> None:
        # Not by their property, which would wait for gradients.
        votes = self.changes.collect_change_flags(vars(self.updater.optimizer).get("param_groups", ()))
        self._pinned_votes.copy_(torch.tensor([*self._votes, *votes], dtype=torch.float64))
        self._sums[len(self.metrics) : -1].copy_(self._pinned_votes, non_blocking=True)
        self._sums[-1] = self._nonfinite_here
        if self.world.size > 1:
            self._sums_handle = collectives.all_reduce_async_(self._sums, "step.sums")
            self.changes.buffer_reducer.start_combining(self._batch_share)

    def all_reduce(self) -> StepResult:
        if self._num_micro_batches == 0:
            self._start_small_all_reduces()
        nonfinite_gradients = self.updater.reduce_gradients()
        waited = 0.0
        if self._sums_handle is not None:
            begin = time.perf_counter()
            collectives.wait(self._sums_handle)
            waited = self.updater.optimizer.waited + time.perf_counter() - begin
            self._sums_handle = None
        agreed = self._sums.cpu().numpy()
        scores, told, votes = np.split(agreed[:-1].copy(), [len(self.metrics), len(self.metrics) + TOLD])
        begin = time.perf_counter()
        self.changes.reconcile_changes(votes.tolist(), self._num_micro_batches)
        waited += time.perf_counter() - begin if self.world.size > 1 else 0.0
        self._messages += self.changes.buffer_reducer.take_warnings()
        nonfinite = bool(agreed[-1])
        self.updater.check_loss_trains(float(agreed[0]))
        return StepResult(
            scores, told, nonfinite, nonfinite_gradients, nonfinite and bool(self._nonfinite_here), waited
        )

    def apply_update(self, factor: float, seed: Sequence[int]) -> dict[str, float]:
        seed_all(seed)  # what an optimizer draws is the same on all ranks
        self._step_in_progress, self.update_in_progress = False, True
        report = self.updater.clip_and_step(factor)
        self.changes.learning_rate_watch.set_baseline(self.updater.optimizer.param_groups)
        if self.ema is not None and not report.get("skipped"):
            self.ema.update_parameters(self.model)
        self.changes.accept_update()
        self.update_in_progress = False
        return report

    def skip_update(self) -> None:
        self._step_in_progress = False
        self.changes.skip_step()

    def base_learning_rate(self) -> float:
        return self.updater.base_lrs[0]

    @explain_nondeterminism
    def evaluate_batch(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        seed_all(seed)
        if self.changes.start_evaluation() and self.ema is not None:
            self.ema.copy_constants(self.model)
        model = self.forward if self.ema is None else self.ema.module.eval()
        with self._autocast_context():
            scores = self._score_for_evaluation(model, to_device(batch, self.device, self.memory_format))
        check_scores(self.recipe, scores, self.metrics, count)
        return sum_scores(scores, self.metrics).cpu().numpy()

    def gather_state(self) -> bytes:
        self.changes.end_evaluation()
        carried = self.updater.gather_carried_state()
        return self._serialize_state(carried) if self.world.rank == 0 else b""

    def local_state(self) -> bytes:
        return self._serialize_state(self.updater.local_carried_state())

    def switch_world(self, world: World) -> None:
        if self._step_in_progress:
            self.skip_update()
        self.updater.leave_world()
        self._sums_handle = None
        self.world = world
        self.changes.set_world_size(world.size)
        self.updater.join_world(world)

    def _serialize_state(self, carried: dict[str, Any] | None) -> bytes:
        """The state with the exchange's part of it."""
        self.changes.check_state_finite()
        if self.ema is not None:
            self.ema.copy_constants(self.model)
        state: dict[str, Any] = {"model": self.model.state_dict(), **self.updater.optimizer_state()}
        if carried is not None:
            state["exchange"] = carried
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def load_state(self, data: bytes) -> None:
        state = read_tensors(data, self.device)
        for part, needed in (("scaler", self.updater.scaler is not None), ("ema", self.ema is not None)):
            if needed != (part in state):
                raise UserError(
                    f"the checkpoint has {'no' if needed else 'a'} {part} state: keep the run's options to resume"
                )
        check_same_model(self.model, state["model"])
        try:
            load_module_state(self.model, state["model"])
            self.updater.load_state(state)
            if self.ema is not None:
                load_module_state(self.ema, state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the checkpoint is of another model or optimizer: {reason}") from error
        self.changes.accept_loaded_state(self.updater.optimizer.param_groups)
        self.update_in_progress = False

    def wire_bytes(self) -> int:
        if self.world.size == 1:
            return 0
        small = self.changes.buffer_reducer.payload_bytes + self._sums.numel() * 8
        return int(self.updater.optimizer.wire_bytes) + collectives.ring_all_reduce_bytes(small, self.world.size)

    def exchange_report(self) -> dict[str, Any]:
        exchange, bucketed = self.updater.optimizer.exchange, self.updater.bucketed_exchange
        advisor = bucketed and bucketed.advisor
        return {
            "buckets": [asdict(bucket) for bucket in exchange.describe_buckets()] if exchange else [],
            "advisor": advisor.advice.to_json() if advisor and advisor.advice else None,
        }

    def take_messages(self) -> list[str]:
        news, self._messages[:] = list(self._messages), []
        return news

    def checksum_state(self) -> dict[str, int]:
        self.changes.end_evaluation()
        return checksum_model(self.model, leave_out=self.changes.buffer_reducer.local_names)

    def trace_graph(self) -> bytes | None:
        shared = [*self.datasets.values(), self.updater.optimizer]
        return trace_model_graph(self.recipe, self.model, shared, self._load_two_examples(), self.world.rank)
