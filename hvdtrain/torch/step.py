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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hvdtrain.collectives import ops
from hvdtrain.collectives.agreement import agree
from hvdtrain.collectives.world import World
from hvdtrain.compression.spec import parse
from hvdtrain.errors import UserError
from hvdtrain.recipe_errors import in_recipe
from hvdtrain.step import TOLD, Agreed, Ids, Split, StepOptions
from hvdtrain.torch import memories
from hvdtrain.torch.buffers import BufferMean, refuse_changing, refuse_nonfinite, refuse_rebound
from hvdtrain.torch.checksums import checksums
from hvdtrain.torch.data import seed_all, to_device
from hvdtrain.torch.exchange import Exchange
from hvdtrain.torch.fingerprint import (
    EXAMPLES,
    changed_example,
    example_getters,
    metrics_part,
    of_split,
    refuse_other_model,
    step_parts,
)
from hvdtrain.torch.graph import trace
from hvdtrain.torch.optimizer import DistributedOptimizer, broadcast_state
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.scores import check, metrics_of, sums
from hvdtrain.torch.settings import change, settings_of
from hvdtrain.torch.setup import (
    check_momentum,
    choose_device,
    load_datasets,
    make_model,
    make_optimizer,
    names_refusals,
    set_up,
)
from hvdtrain.torch.shards import ShardExchange
from hvdtrain.torch.splits import Splits

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchStep:
    """`hvdtrain.step.Step` for a torch recipe."""

    def __init__(self, recipe: Recipe, world: World, options: StepOptions) -> None:
        self.recipe, self.world, self.options = recipe, world, options
        set_up(options)
        self.device = choose_device(options.device, world.local_rank)
        self.datasets = load_datasets(recipe, world, options.seed)
        self.splits = Splits(recipe, self.datasets, options)
        self.examples = self.splits.examples
        ops.all_or_none("examples", self.splits.look_at)

        seed_all([options.seed])
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = ops.all_or_none("model", lambda: make_model(recipe)).to(self.device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=self.format)
        self.inner = ops.all_or_none("optimizer", lambda: make_optimizer(recipe, self.model.parameters()))
        inner = self.inner
        if isinstance(inner, torch.optim.LBFGS) or any("lr" not in group for group in inner.param_groups):
            raise UserError(f"{type(inner).__name__} needs a closure or has no learning rate 'lr': it cannot be used")
        check_momentum(parse(options.compression), inner, world)
        examples = example_getters(self.splits)
        self.parts = ops.all_or_none("agreement.parts", lambda: step_parts(self.device, examples, self.model, inner))
        self.first_examples = of_split(self.parts[EXAMPLES], "train")
        agree("agreement.step", self.parts)
        self._news: list[str] = []
        self._carried: dict[str, Any] | None = None  # the exchange's memories, from one world to the next
        self.optimizer = self._wrap()
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.settings = settings_of(self.optimizer.param_groups)
        self.trained = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
        broadcast_state(self.model, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type) if options.amp == "fp16" else None
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=self.device))  # it starts here also where there are no examples
        averaging = get_ema_multi_avg_fn(options.ema) if options.ema is not None else None  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=averaging) if averaging is not None else None
        self.forward: Any = torch.compile(self.model) if options.compile else self.model
        self.buffers = BufferMean(self._try_out(), world.size)
        self.parts.append(metrics_part(self.metrics))
        agree("agreement.metrics", self.parts[-1:])
        if options.shards is not None:
            refuse_changing(self.model, self.buffers.buffers)
        # The scores, what the ranks tell each other, and whether a loss is not finite.
        self._sums = torch.zeros(len(self.metrics) + TOLD + 1, dtype=torch.float64, device=self.device)
        self._sums_handle: ops.Handle | None = None
        self._nonfinite_here = torch.zeros((), dtype=torch.bool, device=self.device)
        self._passes, self._done, self._part, self._told = 0, 0, 0.0, np.zeros(TOLD)
        self._begun = self.torn = False  # begun: a step that is not finished
        # Pinned: a GPU takes them from there without waiting.
        self._told_pinned = torch.zeros(TOLD, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        # Here, once for the run: what the recipe's methods have set up is there, and of an elastic run's other ranks no
        # connection yet that these processes would keep open.
        self.splits.start()

    def changed_example(self, earlier: Mapping[str, str]) -> str | None:
        return changed_example(self.parts[EXAMPLES], earlier)

    def _wrap(self) -> Any:
        """The recipe's optimizer with the exchange of this world."""
        held = {p for group in self.inner.param_groups for p in group["params"]}
        optimizer: Any = DistributedOptimizer(
            self.inner,
            [(name, p) for name, p in self.model.named_parameters() if p in held],
            average=False,
            compression=self.options.compression,
            exchange=self.options.exchange,
            seed=self.options.seed,
            bucket_bytes=None if self.options.bucket_mib is None else int(self.options.bucket_mib * 2**20),
            shards=self.options.shards,
        )
        exchange = optimizer.exchange
        self.bucketed = exchange if isinstance(exchange, Exchange) else None
        self.shards = exchange if isinstance(exchange, ShardExchange) else None
        if self.bucketed is not None and self.bucketed.advisor is not None:
            self.bucketed.advisor.tell = self._news.append
        return optimizer

    @names_refusals
    def _try_out(self) -> list[torch.Tensor]:
        """Score two examples in training mode and undo it: sets `metrics`, and returns the buffers that changed."""
        before = {name: (b, b.clone()) for name, b in self.model.named_buffers()}
        batch = self._two_examples()
        self.model.train()
        with torch.no_grad(), self._autocast():
            scores = self._score(self.model, batch)
        self.metrics = metrics_of(self.recipe, scores)
        check(self.recipe, scores, self.metrics, min(2, self.examples["train"]))
        refuse_rebound(self.model, {name: b for name, (b, _) in before.items()})
        changing = [b for b, old in before.values() if not torch.equal(b, old)]
        for b, old in before.values():
            b.copy_(old)
        return changing

    def _two_examples(self) -> Any:
        return to_device(self.splits.first_batch(2), self.device, self.format)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.options.amp])

    def _score(self, model: Any, batch: Any) -> Any:
        with in_recipe(self.recipe, "score()"):
            return self.recipe.score(model, batch)

    def load(self, split: Split, chunks: Iterable[Ids], epoch: int) -> Iterator[tuple[Ids, Any]]:
        return self.splits.load(split, chunks, epoch)

    def close(self) -> None:
        self.splits.close()

    def begin(self, passes: Sequence[int], part: float, told: NDArray[np.float64]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.set_backward_passes_per_step(sum(passes))
        if self.shards is not None:
            self.shards.begin(passes)
        self.model.train()
        self._sums.zero_()
        self._nonfinite_here.zero_()
        self._passes, self._done, self._part, self._told = sum(passes), 0, part, told
        self._begun = True
        self.buffers.begin()

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
        (self.scaler.scale(objective) if self.scaler is not None else objective).backward()
        if self.shards is not None:
            self.shards.passed()

    def _start_small(self) -> None:
        self._told_pinned.copy_(torch.from_numpy(self._told))
        self._sums[-TOLD - 1 : -1].copy_(self._told_pinned, non_blocking=True)
        self._sums[-1] = self._nonfinite_here
        if self.world.size > 1:
            self._sums_handle = ops.all_reduce_async_(self._sums, "step.sums")
            self.buffers.start(self._part)

    def exchange(self) -> Agreed:
        if self._passes == 0:
            self._start_small()
        self.optimizer.synchronize()
        waited = 0.0
        if self._sums_handle is not None:
            begin = time.perf_counter()
            ops.wait(self._sums_handle)
            self.buffers.finish()
            waited = self.optimizer.waited + time.perf_counter() - begin
            self._sums_handle = None
        agreed = self._sums.cpu().numpy()
        scores, told = np.split(agreed[:-1].copy(), [len(self.metrics)])
        nonfinite = bool(agreed[-1])
        return Agreed(scores, told, nonfinite, nonfinite and bool(self._nonfinite_here), waited)

    def update(self, factor: float, seed: Sequence[int]) -> dict[str, float]:
        seed_all(seed)  # what an optimizer draws is the same on all ranks
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        report: dict[str, float] = {}
        self._begun, self.torn = False, True
        if self.scaler is not None:
            report["loss_scale"] = self.scaler.get_scale()
            self.scaler.unscale_(self.optimizer)
        if self.options.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.trained, self.options.clip_norm)
            report["gradient_norm"] = float(norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            # The gradients are the same on all ranks, and so is the decision to skip.
            self.scaler.step(self.optimizer)
            self.scaler.update()
            scale = self.scaler.get_scale()
            report["skipped"] = float(scale < report["loss_scale"])
            if self.bucketed is not None and scale != report["loss_scale"]:
                memories.scale(self.bucketed, scale / report["loss_scale"])
        if self.ema is not None and not report.get("skipped"):
            self.ema.update_parameters(self.model)
        self.torn = False
        return report

    def skip(self) -> None:
        self._begun = False
        self.buffers.restore()

    def learning_rate(self) -> float:
        return self.base_lrs[0]

    @names_refusals
    @torch.no_grad()
    def evaluate(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        seed_all(seed)
        model = self.forward
        if self.ema is not None:
            model = self.ema.module
            for averaged, current in zip(model.buffers(), self.model.buffers(), strict=True):
                averaged.copy_(current)
        model.eval()
        with self._autocast():
            scores = self._score(model, to_device(batch, self.device, self.format))
        check(self.recipe, scores, self.metrics, count)
        return sums(scores, self.metrics).cpu().numpy()

    def state(self) -> bytes:
        carried = memories.gather(self.bucketed, self.options.exact_residuals) if self.bucketed is not None else None
        return self._written(carried) if self.world.rank == 0 else b""

    def whole_state(self) -> bytes:
        return self._written({**self._carried, "debts": {}} if self._carried is not None else None)

    def rejoin(self, world: World) -> None:
        if self._begun:
            self.skip()
        if self.bucketed is not None:
            if self._carried is None or self.bucketed.buckets:  # else the state was to come into a world that broke
                self._carried = memories.own(self.bucketed)
            self.bucketed.close()
        self._sums_handle = None
        self.world = world
        self.buffers = BufferMean(self.buffers.buffers, world.size)
        # Not by its property, which would wait for gradients that will not come.
        self.inner.param_groups, self.inner.state = self.optimizer.__dict__["param_groups"], self.optimizer.state
        self.optimizer = self._wrap()

    def _written(self, carried: dict[str, Any] | None) -> bytes:
        """The state with the exchange's part of it."""
        refuse_nonfinite(self.model, self.buffers.buffers)
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["settings"] = self.settings
        if carried is not None:
            state["exchange"] = carried
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def load_state(self, data: bytes) -> None:
        state = torch.load(io.BytesIO(data), map_location=self.device, weights_only=True)
        for part, needed in (("scaler", self.scaler is not None), ("ema", self.ema is not None)):
            if needed != (part in state):
                raise UserError(
                    f"the checkpoint has {'no' if needed else 'a'} {part} state: keep the run's options to resume"
                )
        refuse_other_model(self.model, state["model"])
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            change(self.optimizer.param_groups, self.settings, state.get("settings", self.settings))
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the checkpoint is of another model or optimizer: {reason}") from error
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.torn = False
        if self.bucketed is not None and "exchange" in state:
            memories.load(self.bucketed, state["exchange"])
            if self._carried is not None and not state["exchange"]["debts"]:  # a checkpoint has those of all ranks
                memories.keep(self.bucketed, self._carried)
            self._carried = None

    def wire_bytes(self) -> int:
        if self.world.size == 1:
            return 0
        small = self.buffers.payload_bytes + self._sums.numel() * 8
        return int(self.optimizer.wire_bytes) + ops.ring_bytes(small, self.world.size)

    def exchange_report(self) -> dict[str, Any]:
        exchange, advisor = self.optimizer.exchange, self.bucketed and self.bucketed.advisor
        return {"buckets": exchange.report() if exchange else [], "advisor": advisor.advice if advisor else None}

    def news(self) -> list[str]:
        news, self._news[:] = list(self._news), []
        return news

    def checksums(self) -> dict[str, int]:
        return checksums(self.model)

    def graph(self) -> bytes | None:
        self.model.eval()
        return trace(self.recipe, self.model, self._two_examples())
