"""A training step in torch: gradients of micro-batches, their exchange, the update, the evaluation and the state."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import agree
from hvdtrain.comm.world import World
from hvdtrain.exchange.checksums import checksums
from hvdtrain.exchange.tensors import load_module, read_tensors
from hvdtrain.recipe.framework import TOLD, Agreed, Ids, Split, StepOptions
from hvdtrain.system.errors import RecipeError, UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.broadcast import broadcast_state
from hvdtrain.torch.buffers import buffer_modes
from hvdtrain.torch.changes import Changes
from hvdtrain.torch.data import seed_all, to_device
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.fingerprint import (
    EXAMPLES,
    changed_example,
    example_getters,
    metrics_part,
    of_split,
    refuse_other_model,
    step_parts,
)
from hvdtrain.torch.modes import Modes
from hvdtrain.torch.process import ProcessSettings
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.scores import check, sums
from hvdtrain.torch.setup import choose_device, load_datasets, make_model, names_refusals, set_up
from hvdtrain.torch.splits import Splits
from hvdtrain.torch.stage import random_state_kept
from hvdtrain.torch.trial import draw, initialize_lazy, refuse_sync_batch_norm, try_out
from hvdtrain.torch.update import Updater
from hvdtrain.torch.watch import refuse_scheduler

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchStep:
    """`hvdtrain.recipe.framework.Step` for a torch recipe."""

    def __init__(self, recipe: Recipe, world: World, options: StepOptions) -> None:
        self.recipe, self.world, self.options = recipe, world, options
        self._takes_derivatives = False
        self._closing = contextlib.ExitStack()
        self._closing.callback(ProcessSettings().restore)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        recipe, world, options = self.recipe, self.world, self.options
        set_up(options)
        self.device = choose_device(options.device, world.local_rank)
        self.datasets = load_datasets(recipe, world, options.seed)
        self.splits = Splits(recipe, self.datasets, options)
        self._closing.callback(self.splits.close)
        self.examples = self.splits.examples
        collectives.all_or_none("examples", self.splits.look_at)

        seed_all([options.seed])
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = collectives.all_or_none("model", lambda: make_model(recipe)).to(self.device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=self.format)
        modes = Modes(self.model)
        refuse_sync_batch_norm(self.model)
        initialize_lazy(recipe, self.model, self._two_examples)
        name = type(recipe).__name__
        declared = buffer_modes(name, recipe.buffers, self.model)
        self.updater = Updater(recipe, self.model, self.device, options)
        self._closing.callback(self.updater.close)
        self._news = self.updater.news
        examples, inner = example_getters(self.splits), self.updater.optimizer
        refuse_scheduler(recipe, inner)
        self.parts = collectives.all_or_none(
            "agreement.parts", lambda: step_parts(self.device, examples, self.model, inner)
        )
        self.first_examples = of_split(self.parts[EXAMPLES], "train")
        agree("agreement.step", self.parts)
        self._news += modes.notes()
        shared, batch, count = [*self.datasets.values(), inner], self._two_examples(), min(2, self.examples["train"])
        attempt = names_refusals(try_out)
        trial = collectives.all_or_none(
            "trial", lambda: attempt(recipe, self.model, shared, batch, count, self._autocast())
        )
        self.metrics, self.collectives = trial.metrics, trial.collectives
        self.parts.append(metrics_part(self.metrics))
        agree("agreement.metrics", self.parts[-1:])
        self.updater.start_world(world)
        broadcast_state(self.model, self.updater.optimizer)
        self.ema = AveragedModel(self.model, options.ema) if options.ema is not None else None
        self.forward: Any = torch.compile(self.model) if options.compile else self.model
        self.changes = Changes(name, self.model, modes, declared, world.size, options.shards is not None)
        self.changes.buffers.expect_changes(trial.buffers)
        self.changes.rates.accept(self.updater.optimizer.param_groups)
        # The scores, what the ranks tell each other, what has changed on a rank, and whether a loss is not finite.
        own = TOLD + self.changes.places
        self._sums = torch.zeros(len(self.metrics) + own + 1, dtype=torch.float64, device=self.device)
        self._sums_handle: collectives.Handle | None = None
        self._nonfinite_here = torch.zeros((), dtype=torch.bool, device=self.device)
        self._passes, self._done, self._part, self._told = 0, 0, 0.0, np.zeros(TOLD)
        self._begun = self.torn = False  # begun: a step that is not finished
        # Pinned: a GPU takes them from there without waiting.
        self._told_pinned = torch.zeros(own, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        # Here, once for the run: what the recipe's methods have set up is there, and of an elastic run's other ranks no
        # connection yet that these processes would keep open.
        self.splits.start()

    def changed_example(self, earlier: Mapping[str, str]) -> str | None:
        return changed_example(self.parts[EXAMPLES], earlier)

    def close(self) -> None:
        """Leave the recipe's model and optimizer, and this process, as they would be without hvdtrain's hooks."""
        self._closing.close()

    def _two_examples(self) -> Any:
        with random_state_kept():
            return to_device(self.splits.first_batch(2), self.device, self.format)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.options.amp])

    def _score(self, model: Any, batch: Any) -> Any:
        with in_recipe(self.recipe, "score()"):
            return self.recipe.score(model, batch)

    def _score_untrained(self, model: Any, batch: Any) -> Any:
        """Score without a graph, unless `score` takes derivatives itself, as of an energy."""
        if not self._takes_derivatives:
            try:
                with torch.no_grad():
                    return self._score(model, batch)
            except RecipeError as error:
                if "does not require grad" not in str(error):
                    raise
                self._takes_derivatives = True
        with torch.enable_grad():
            return self._score(model, batch)

    def load(self, split: Split, chunks: Iterable[Ids], epoch: int) -> Iterator[tuple[Ids, Any]]:
        return self.splits.load(split, chunks, epoch)

    def begin(self, passes: Sequence[int], part: float, told: NDArray[np.float64]) -> None:
        self.updater.start_step(passes)
        self._sums.zero_()
        self._nonfinite_here.zero_()
        self._passes, self._done, self._part, self._told = sum(passes), 0, part, told
        self._begun = True
        self.changes.start_step()

    @names_refusals
    def micro_batch(self, batch: Any, count: int, weight: float, seed: Sequence[int]) -> None:
        seed_all(seed)
        with self._autocast():
            scores = self._score(self.forward, to_device(batch, self.device, self.format))
        check(self.recipe, scores, self.metrics, count)
        loss = scores["loss"]
        self._sums[: len(self.metrics)] += sums(scores, self.metrics)
        self._nonfinite_here |= ~torch.isfinite(loss.detach()).all()
        self._done += 1
        if self._done == self._passes:
            # The forward passes are over: sums and buffers travel while backward computes.
            self._start_small()
        objective = loss.to(torch.promote_types(loss.dtype, torch.float32)).sum() * weight
        self.updater.backward(objective, last=self._done == self._passes)

    def _start_small(self) -> None:
        # Not by their property, which would wait for gradients.
        votes = self.changes.votes(vars(self.updater.optimizer).get("param_groups", ()))
        self._told_pinned.copy_(torch.tensor([*self._told, *votes], dtype=torch.float64))
        self._sums[len(self.metrics) : -1].copy_(self._told_pinned, non_blocking=True)
        self._sums[-1] = self._nonfinite_here
        if self.world.size > 1:
            self._sums_handle = collectives.all_reduce_async_(self._sums, "step.sums")
            self.changes.buffers.start(self._part)

    def exchange(self) -> Agreed:
        if self._passes == 0:
            self._start_small()
        nonfinite_gradients = self.updater.exchange()
        waited = 0.0
        if self._sums_handle is not None:
            begin = time.perf_counter()
            collectives.wait(self._sums_handle)
            waited = self.updater.optimizer.waited + time.perf_counter() - begin
            self._sums_handle = None
        agreed = self._sums.cpu().numpy()
        scores, told, votes = np.split(agreed[:-1].copy(), [len(self.metrics), len(self.metrics) + TOLD])
        begin = time.perf_counter()
        self.changes.settle(votes.tolist(), self._passes)
        waited += time.perf_counter() - begin if self.world.size > 1 else 0.0
        self._news += self.changes.buffers.take_warnings()
        nonfinite = bool(agreed[-1])
        self.updater.refuse_untrained(float(agreed[0]))
        return Agreed(scores, told, nonfinite, nonfinite_gradients, nonfinite and bool(self._nonfinite_here), waited)

    def update(self, factor: float, seed: Sequence[int]) -> dict[str, float]:
        seed_all(seed)  # what an optimizer draws is the same on all ranks
        self._begun, self.torn = False, True
        report = self.updater.apply(factor)
        self.changes.rates.accept(self.updater.optimizer.param_groups)
        if self.ema is not None and not report.get("skipped"):
            self.ema.update_parameters(self.model)
        self.changes.accept()
        self.torn = False
        return report

    def skip(self) -> None:
        self._begun = False
        self.changes.skip()

    def learning_rate(self) -> float:
        return self.updater.base_lrs[0]

    @names_refusals
    def evaluate(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        seed_all(seed)
        if self.changes.start_evaluation() and self.ema is not None:
            self.ema.take_over_constants(self.model)
        model = self.forward if self.ema is None else self.ema.module.eval()
        with self._autocast():
            scores = self._score_untrained(model, to_device(batch, self.device, self.format))
        check(self.recipe, scores, self.metrics, count)
        return sums(scores, self.metrics).cpu().numpy()

    def state(self) -> bytes:
        self.changes.end_evaluation()
        carried = self.updater.gather_memories()
        return self._written(carried) if self.world.rank == 0 else b""

    def whole_state(self) -> bytes:
        return self._written(self.updater.memories_of_rank())

    def rejoin(self, world: World) -> None:
        if self._begun:
            self.skip()
        self.updater.leave_world()
        self._sums_handle = None
        self.world = world
        self.changes.start_world(world.size)
        self.updater.start_world(world)

    def _written(self, carried: dict[str, Any] | None) -> bytes:
        """The state with the exchange's part of it."""
        self.changes.refuse_nonfinite()
        if self.ema is not None:
            self.ema.take_over_constants(self.model)
        state: dict[str, Any] = {"model": self.model.state_dict(), **self.updater.state()}
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
        refuse_other_model(self.model, state["model"])
        try:
            load_module(self.model, state["model"])
            self.updater.load(state)
            if self.ema is not None:
                load_module(self.ema, state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the checkpoint is of another model or optimizer: {reason}") from error
        self.changes.take_loaded(self.updater.optimizer.param_groups)
        self.torn = False

    def wire_bytes(self) -> int:
        if self.world.size == 1:
            return 0
        small = self.changes.buffers.payload_bytes + self._sums.numel() * 8
        return int(self.updater.optimizer.wire_bytes) + collectives.ring_bytes(small, self.world.size)

    def exchange_report(self) -> dict[str, Any]:
        exchange, bucketed = self.updater.optimizer.exchange, self.updater.bucketed
        advisor = bucketed and bucketed.advisor
        return {"buckets": exchange.report() if exchange else [], "advisor": advisor.advice if advisor else None}

    def news(self) -> list[str]:
        news, self._news[:] = list(self._news), []
        return news

    def checksums(self) -> dict[str, int]:
        self.changes.end_evaluation()
        return checksums(self.model, leave_out=self.changes.buffers.local)

    def graph(self) -> bytes | None:
        shared = [*self.datasets.values(), self.updater.optimizer]
        return draw(self.recipe, self.model, shared, self._two_examples(), self.world.rank)
