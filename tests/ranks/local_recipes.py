"""Recipes for rounds of local steps, in float64, and the same rounds computed in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hvdtrain
from hvdtrain.recipe import order
from hvdtrain.torch import Recipe

EXAMPLES, BATCH = 101, 9  # the last batch has 2 examples: on 3 ranks one has none
BUILT: list[nn.Module] = []  # by `model`, in this process


@dataclass(kw_only=True)
class Curve(Recipe):
    """A regression with a small network."""

    epochs: int = 2
    batch_size: int = BATCH
    lr: float = 0.05
    schedule: str = "constant"
    momentum: float = 0.0
    weighted: bool = False  # the loss has denominators of its own, of which some are 0

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        BUILT.append(net)
        return net

    def dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(EXAMPLES, 4, generator=made, dtype=torch.float64)
        weights = torch.randint(0, 2, (EXAMPLES,), generator=made).double()
        return TensorDataset(inputs, inputs.sum(1).sin(), weights)

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)

    def score(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        inputs, targets, weights = batch
        losses = (model(inputs).squeeze(1) - targets).square()
        return {"loss": (losses * weights, weights) if self.weighted else losses}


@dataclass(kw_only=True)
class CurveAdam(Curve):
    """The same with batch norm, dropout and Adam."""

    lr: float = 0.01

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1)).double()
        BUILT.append(net)
        return net

    def dataset(self, split: str) -> TensorDataset:
        return TensorDataset(*(part[:99] for part in super().dataset(split).tensors))

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr)


@dataclass(kw_only=True)
class Odd(Curve):
    """What rounds cannot do, or must find: by `kind`."""

    kind: str = ""

    def model(self) -> nn.Module:
        net = super().model()
        if self.kind == "unused":
            net.append(nn.Identity())
            net.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        return net

    def score(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        scores = super().score(model, batch)
        if self.kind == "detached":
            return {"loss": scores["loss"].detach()}
        if self.kind == "collective":
            import horovod.torch as hvd

            hvd.allreduce(torch.ones(1), name="odd")
        if self.kind == "clamps" and self.now.training:
            with torch.no_grad():
                model[0].weight.mul_(0.5)
        if self.kind == "infinite" and self.now.training and self.now.rank == 1 and self.now.step == 2:
            scores["loss"].register_hook(lambda gradient: gradient * float("inf"))
        return scores


def fit(recipe: Recipe, run_dir: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train on this world; return the parameters at the end, and the summary."""
    summary = hvdtrain.fit(recipe, run_dir=run_dir, quiet=True, **options)
    return {name: p.detach().clone() for name, p in BUILT[-1].named_parameters()}, summary


@dataclass(frozen=True)
class Rounds:
    """Rounds of local steps, computed in one process."""

    ranks: int
    local_steps: int
    first_step: int = 0
    outer: tuple[float, float] = (1.0, 0.0)  # rate and momentum
    clip_norm: float | None = None
    ema: float | None = None

    def train(self, recipe: Curve) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the parameters at the end, and their moving average."""
        nets = [recipe.model() for _ in range(self.ranks)]
        optimizers = [recipe.optimizer(net.parameters()) for net in nets]
        data = recipe.dataset("train").tensors
        velocity = [torch.zeros_like(p) for p in nets[0].parameters()]
        averages: list[Tensor] = []
        step, begin, seen, anchor = 0, 0, [0] * self.ranks, list[Tensor]()
        for epoch in range(recipe.epochs):
            batches = list(order.iterate_batches(EXAMPLES, recipe.batch_size, 0, epoch))
            for number, ids in enumerate(batches, 1):
                is_local = step >= self.first_step
                begin = begin if is_local else step + 1
                if step == begin:
                    anchor = [p.detach().clone() for p in nets[0].parameters()]
                for rank, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                    own = ids[slice(*order.part_bounds(len(ids), rank, self.ranks))] if is_local else ids
                    if not recipe.weighted or data[2][torch.from_numpy(ids)].any():  # else all ranks skip the step
                        seen[rank] += len(own)
                    if len(own):
                        self.update(recipe, net, optimizer, [column[torch.from_numpy(own)] for column in data])
                step += 1
                if not is_local:
                    self.average(averages, nets[0], 1)
                    seen = [0] * self.ranks
                elif step - begin == self.local_steps or number == len(batches):
                    self.end_round(nets, anchor, velocity, seen)
                    self.average(averages, nets[0], step - begin)
                    begin, seen = step, [0] * self.ranks
            average_momentum(nets, optimizers)  # each epoch ends with a checkpoint
        names = [name for name, _ in nets[0].named_parameters()]
        end = {name: p.detach() for name, p in nets[0].named_parameters()}
        return end, dict(zip(names, averages, strict=True))

    def update(self, recipe: Curve, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor]) -> None:
        loss = recipe.score(net, batch)["loss"]
        if isinstance(loss, tuple) and not loss[1].any():
            return
        optimizer.zero_grad()
        (loss[0].sum() / loss[1].sum() if isinstance(loss, tuple) else loss.mean()).backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), self.clip_norm)
        optimizer.step()

    @torch.no_grad()
    def end_round(
        self, nets: list[nn.Module], anchor: list[Tensor], velocity: list[Tensor], seen: Sequence[int]
    ) -> None:
        rate, momentum = self.outer
        for start, v, *copies in zip(anchor, velocity, *(net.parameters() for net in nets), strict=True):
            gradient = sum((start - p) * (count / sum(seen)) for p, count in zip(copies, seen, strict=True))
            v.mul_(momentum).add_(gradient)
            for p in copies:
                p.copy_(start - rate * (gradient + momentum * v))

    def average(self, averages: list[Tensor], net: nn.Module, steps: int) -> None:
        values = [p.detach().clone() for p in net.parameters()]
        if not averages:
            averages += values
            return
        decay = (self.ema or 0.0) ** steps
        averages[:] = [decay * old + (1 - decay) * new for old, new in zip(averages, values, strict=True)]


def average_momentum(nets: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give all ranks' optimizers the mean of their momentum."""
    for copies in zip(*(net.parameters() for net in nets), strict=True):
        pairs = zip(optimizers, copies, strict=True)
        buffers = [optimizer.state[p]["momentum_buffer"] for optimizer, p in pairs if optimizer.state[p]]
        kept = [buffer for buffer in buffers if buffer is not None]
        mean = torch.stack(kept).mean(0) if kept else None
        for buffer in kept:
            buffer.copy_(mean)
