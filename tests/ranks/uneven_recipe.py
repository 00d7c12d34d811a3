"""A recipe whose ranks are slow by turns, or one of whose replicas is changed by hand; who and how is drawn."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from hvdtrain.comm import collectives
from hvdtrain.torch import Recipe, option

EVERY = 10  # steps of an interval
PAUSE = 0.01  # seconds of every rank's every pass; they leave the cores to whoever burns
LONGER = 0.08  # of the slow one's step: several times what a busy machine adds to one


def drawn(seed: int, ranks: int, intervals: int) -> list[tuple[int, str, str] | None]:
    """Who is slow in each interval, in which part and how; None: all alike."""
    draw = random.Random(seed)
    slow = [
        (draw.randrange(ranks), draw.choice(["data", "compute"]), draw.choice(["sleep", "burn"]))
        for _ in range(intervals * 4 // 5)
    ]
    nobody: list[tuple[int, str, str] | None] = [None] * (intervals - len(slow))
    mixed = [*slow, *nobody]
    draw.shuffle(mixed)
    return mixed


def spend(seconds: float, how: str) -> None:
    end = time.perf_counter() + seconds
    if how == "sleep":
        time.sleep(seconds)
    while time.perf_counter() < end:
        pass


class Examples(Dataset[Any]):
    """16 values and their sum; the first example that is asked for in a step can take long."""

    def __init__(self, recipe: Uneven, split: str) -> None:
        self.recipe, self.split = recipe, split
        self.values = torch.randn(240, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        if self.split == "train":
            self.recipe.take_long("data")
        return self.values[i], self.values[i].sum()


@dataclass(kw_only=True)
class Uneven(Recipe):
    """Least squares by a small network, on ranks of which one is slow."""

    draw: int = option(0, "who is slow is drawn from this")
    intervals: int = option(0, "of ten steps each; in four of five one rank is slow, in the others all; 0: nobody")
    batch_size: int = 24
    lr: float = 0.01

    def __post_init__(self) -> None:
        self.passes, self.slowed = 0, {"data": -1, "compute": -1}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def dataset(self, split: str) -> Any:
        return Examples(self, split)

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        inputs, targets = batch
        if model.training and torch.is_grad_enabled():
            time.sleep(PAUSE)
            self.take_long("compute")
            self.passes += 1
        return {"loss": (model(inputs).squeeze(1) - targets).square()}

    def take_long(self, part: str) -> None:
        """Once a step, if it is this rank's turn. A step is one pass."""
        interval = self.passes // EVERY
        if interval >= self.intervals or self.slowed[part] == self.passes:
            return
        self.slowed[part] = self.passes
        turn = drawn(self.draw, collectives.size(), self.intervals)[interval]
        if turn is None and part == "compute":
            spend(LONGER, "sleep")
        elif turn is not None and turn[:2] == (collectives.rank(), part):
            spend(LONGER, turn[2])


@dataclass(kw_only=True)
class Even(Uneven):
    """Without batch norm."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))


@dataclass(kw_only=True)
class Drifting(Uneven):
    """A weight of one rank is changed by as little as can be, in the update of some step."""

    rank: int = option(0, "whose weight")
    lr: float = 0.0001
    at_step: int = option(1, "the step in whose update, from 1")
    parameter: str = option("0.weight", "which")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.updates = 0

    def model(self) -> nn.Module:
        self.net = super().model()
        return self.net

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        optimizer = super().optimizer(params)
        optimizer.register_step_pre_hook(lambda *_: self.drift())
        return optimizer

    def drift(self) -> None:
        self.updates += 1
        if (self.updates, collectives.rank()) == (self.at_step, self.rank):
            with torch.no_grad():
                values = self.net.get_parameter(self.parameter).view(-1)
                # The one with most room below its next power of two: beyond that, rounding could undo it.
                mantissa, exponent = torch.frexp(values)
                place = torch.ldexp(1 - mantissa.abs(), exponent).argmax()
                values[place] = torch.nextafter(values[place], torch.tensor(torch.inf))
