"""A training step in torch: gradients of micro-batches, their exchange, the update, the evaluation and the state."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hvdtrain.collectives import ops
from hvdtrain.collectives.world import World
from hvdtrain.compression.spec import parse
from hvdtrain.errors import RunError, UserError
from hvdtrain.step import Agreed, Ids, Split, StepOptions
from hvdtrain.torch import memories
from hvdtrain.torch.buffers import BufferMean
from hvdtrain.torch.data import batches, seed_all, to_device
from hvdtrain.torch.optimizer import DistributedOptimizer, broadcast_state
from hvdtrain.torch.recipe import Recipe

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchStep:
    """`hvdtrain.step.Step` for a torch recipe."""

    def __init__(self, recipe: Recipe, world: World, options: StepOptions) -> None:
        self.recipe, self.world, self.options = recipe, world, options
        torch.set_num_threads(options.threads)
        self.device = choose_device(options.device, world.local_rank)
        self.datasets = load_datasets(recipe, world)
        self.examples: dict[Split, int] = {split: len(data) for split, data in self.datasets.items()}

        seed_all([options.seed])
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = recipe.model().to(self.device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=self.format)
        inner = recipe.optimizer(self.model.parameters())
        held = {p for group in inner.param_groups for p in group["params"]}
        named = [(name, p) for name, p in self.model.named_parameters() if p in held]
        spec = parse(options.compression)
        if spec.momentum and any(group.get("momentum") for group in inner.param_groups):
            raise UserError(f"compression {spec.text!r}: its momentum replaces the optimizer's: set that to 0")
        self.optimizer: Any = DistributedOptimizer(
            inner,
            named,
            average=False,
            compression=options.compression,
            exchange=options.exchange,
            seed=options.seed,
        )
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.trained = [p for _, p in named if p.requires_grad]
        broadcast_state(self.model, self.optimizer)

        self.scaler = torch.amp.GradScaler(self.device.type) if options.amp == "fp16" else None
        averaging = get_ema_multi_avg_fn(options.ema) if options.ema is not None else None  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=averaging) if averaging is not None else None
        self.forward: Any = torch.compile(self.model) if options.compile else self.model
        self.metrics, changing = self._try_out()
        self.buffers = BufferMean(changing, world.size)
        self._sums = torch.zeros(len(self.metrics) + 2, dtype=torch.float64, device=self.device)
        self._sums_handle: ops.Handle | None = None
        self._nonfinite_here = torch.zeros((), dtype=torch.bool, device=self.device)
        self._passes = self._done = 0

    def _try_out(self) -> tuple[tuple[str, ...], list[torch.Tensor]]:
        """Score two examples in training mode and undo it: the metrics' names, and the buffers that this changed."""
        buffers = list(self.model.buffers())
        before = [b.clone() for b in buffers]
        ids = np.arange(min(2, self.examples["train"]), dtype=np.int64)
        batch = to_device(next(self.load("train", [ids], 0)), self.device, self.format)
        self.model.train()
        with torch.no_grad(), self._autocast():
            scores = self.recipe.score(self.model, batch)
        if not isinstance(scores, dict) or "loss" not in scores:
            raise UserError(f"{type(self.recipe).__name__}.score must return a dict with 'loss', got {_shown(scores)}")
        for name, score in scores.items():
            if not isinstance(score, torch.Tensor) or score.shape != (len(ids),):
                raise UserError(
                    f"{type(self.recipe).__name__}.score must return one value per example: {name!r} should have "
                    f"shape ({len(ids)},) for {len(ids)} examples, got {_shown(score)}"
                )
        changing = [b for b, old in zip(buffers, before, strict=True) if not torch.equal(b, old)]
        for b, old in zip(buffers, before, strict=True):
            b.copy_(old)
        return ("loss", *(name for name in scores if name != "loss")), changing

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.options.amp])

    def _score_sums(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """(metrics,) float64: each score summed over the batch."""
        return torch.stack([scores[name].detach().double().sum() for name in self.metrics])

    def load(self, split: Split, chunks: Sequence[Ids], epoch: int) -> Iterator[Any]:
        return batches(self.datasets[split], chunks, [self.options.seed, epoch], self.options.workers)

    def begin(self, passes: int, stop: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.set_backward_passes_per_step(passes)
        self.model.train()
        self._sums.zero_()
        self._sums[-1] = stop
        self._nonfinite_here.zero_()
        self._passes, self._done = passes, 0

    def micro_batch(self, batch: Any, weight: float, part: float, seed: Sequence[int]) -> None:
        seed_all(seed)
        with self._autocast():
            scores = self.recipe.score(self.forward, to_device(batch, self.device, self.format))
        loss = scores["loss"]
        self._sums[:-2] += self._score_sums(scores)
        self._nonfinite_here |= ~torch.isfinite(loss.detach()).all()
        self._done += 1
        if self._done == self._passes:
            # The forward passes are over: sums and buffers travel while backward computes.
            self._start_small(part)
        objective = loss.to(torch.promote_types(loss.dtype, torch.float32)).sum() * weight
        (self.scaler.scale(objective) if self.scaler is not None else objective).backward()  # type: ignore[no-untyped-call]

    def _start_small(self, part: float) -> None:
        self._sums[-2] = self._nonfinite_here
        if self.world.size > 1:
            self._sums_handle = ops.all_reduce_async_(self._sums, "step.sums")
            self.buffers.start(part)

    def exchange(self) -> Agreed:
        if self._passes == 0:
            self._start_small(0.0)
        self.optimizer.synchronize()
        waited = 0.0
        if self._sums_handle is not None:
            begin = time.perf_counter()
            ops.wait(self._sums_handle)
            self.buffers.finish()
            waited = self.optimizer.waited + time.perf_counter() - begin
            self._sums_handle = None
        sums = self._sums.cpu().numpy()
        nonfinite, stop = bool(sums[-2]), bool(sums[-1])
        return Agreed(sums[:-2].copy(), nonfinite, stop, nonfinite and bool(self._nonfinite_here), waited)

    def update(self, factor: float) -> dict[str, float]:
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        report: dict[str, float] = {}
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
            if self.optimizer.exchange is not None and scale != report["loss_scale"]:
                memories.scale(self.optimizer.exchange, scale / report["loss_scale"])
        if self.ema is not None and not report.get("skipped"):
            self.ema.update_parameters(self.model)
        return report

    def learning_rate(self) -> float:
        return self.base_lrs[0]

    @torch.no_grad()
    def evaluate(self, batch: Any) -> NDArray[np.float64]:
        model = self.forward
        if self.ema is not None:
            model = self.ema.module
            for averaged, current in zip(model.buffers(), self.model.buffers(), strict=True):
                averaged.copy_(current)
        model.eval()
        with self._autocast():
            scores = self.recipe.score(model, to_device(batch, self.device, self.format))
        return self._score_sums(scores).cpu().numpy()

    def state(self) -> bytes:
        exchange = self.optimizer.exchange
        residuals = memories.gather(exchange, self.options.exact_residuals) if exchange and exchange.coded else None
        if self.world.rank != 0:
            return b""
        for name, p in self.model.named_parameters():
            if not torch.isfinite(p).all():
                raise RunError(f"parameter {name} is not finite; no checkpoint was written")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if residuals is not None:
            state["exchange"] = residuals
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
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            lines = str(error).splitlines()
            raise UserError(f"the checkpoint is of another model or optimizer: {lines[-1].strip()}") from error
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.optimizer.exchange is not None and "exchange" in state:
            memories.load(self.optimizer.exchange, state["exchange"])

    def wire_bytes(self) -> int:
        if self.world.size == 1:
            return 0
        small = self.buffers.payload_bytes + self._sums.numel() * 8
        return int(self.optimizer.wire_bytes) + ops.ring_bytes(small, self.world.size)

    def graph(self) -> bytes | None:
        recipe, model = self.recipe, self.model

        class Loss(torch.nn.Module):
            """Tracing needs a module from tensors to a tensor."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
                return recipe.score(self.model, tensors)["loss"]

        ids = np.arange(min(2, self.examples["train"]), dtype=np.int64)
        batch = to_device(next(self.load("train", [ids], 0)), self.device, self.format)
        if not isinstance(batch, (list, tuple)) or not all(isinstance(part, torch.Tensor) for part in batch):
            return None
        model.eval()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # tracing warns of every branch in Python
            from torch.utils.tensorboard._pytorch_graph import graph

            try:
                return graph(Loss(), tuple(batch))[0].SerializeToString()  # type: ignore[no-any-return, no-untyped-call]
            except RuntimeError:
                return None


def load_datasets(recipe: Recipe, world: World) -> dict[Split, Any]:
    """The recipe's datasets. The first rank of each host goes first, so that what it fetches is there for the others.

    Raises UserError on all ranks where it is raised on one, or where a dataset is empty.
    """
    loaded: dict[Split, Any] = {}
    for turn in (True, False):
        error = None
        if (world.local_rank == 0) == turn:
            try:
                loaded = {"train": recipe.dataset("train"), "eval": recipe.dataset("eval")}
            except UserError as problem:
                error = str(problem)
        for problem_of_one in ops.gather_json(error, "datasets"):
            if problem_of_one:
                raise UserError(problem_of_one)
    for split, dataset in loaded.items():
        if len(dataset) == 0:
            raise UserError(f"the recipe's {split!r} dataset is empty")
    return loaded


def choose_device(wanted: str | None, local_rank: int) -> torch.device:
    """This rank's device; ranks of a host take its GPUs in turn. Raises UserError where there is no cuda to take."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; expected cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _shown(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
