"""Recipes for a parameter server, and the same training in one process by numpy, from nothing but the ledger."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hvdtrain.data.stream import Stream
from hvdtrain.recipe.order import SampleOrder
from hvdtrain.recipe.schedule import parse_schedule
from tests.ranks.exact_recipe import TRAIN, Exact

MOMENTUM = 0.9


@dataclass(kw_only=True)
class Least(Exact):
    """Least squares in float64; the last rank computes slower if PACE says by how many seconds."""

    epochs: int = 2
    batch_size: int = 40
    lr: float = 0.01
    schedule: str = "warmup:1ep cosine"

    def score(self, model: Any, batch: Any) -> Any:
        if model.training and torch.is_grad_enabled() and (pace := os.environ.get("HVDTRAIN_TEST_PACE")):
            names = ("OMPI_COMM_WORLD_" if "OMPI_COMM_WORLD_RANK" in os.environ else "HOROVOD_") + "%s"
            last = int(os.environ[names % "RANK"]) == int(os.environ[names % "SIZE"]) - 1
            time.sleep(float(pace) * (4 if last else 1))
        return super().score(model, batch)


@dataclass(kw_only=True)
class Dropping(Least):
    """A network in float32 with dropout, AdamW, and a parameter that has no gradient in some items."""

    lr: float = 0.003

    def model(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "net": nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1)),
                "rare": nn.Linear(5, 1),
            }
        )

    def optimizer(self, params: Any) -> Any:
        return torch.optim.AdamW(params, lr=self.lr)

    def score(self, model: Any, batch: Any) -> Any:
        inputs, targets = (values.float() for values in batch)
        made = model["net"](inputs).squeeze(1)
        if inputs[0, 0] > 0:
            made = made + 0.1 * model["rare"](inputs).squeeze(1)
        return {"loss": (made - targets).square()}


@dataclass(kw_only=True)
class Streamed(Least):
    """Examples without numbers."""

    def dataset(self, split: str) -> Any:
        return (
            super().dataset(split) if split != "train" else Stream(lambda: super(Streamed, self).dataset("train"), 1003)
        )


def replay_by_numpy(run_dir: Path, recipe: Least, batch: int) -> np.ndarray[Any, Any]:
    """The weights of `Least` after the steps of a ledger, in float64: momentum SGD on the gradients that it names."""
    inputs, targets = (values.numpy() for values in TRAIN)
    weights = {0: recipe.initial().numpy().copy()}
    velocity = np.zeros(5)
    steps_per_epoch = -(-len(targets) // batch)
    schedule = parse_schedule(recipe.schedule, recipe.epochs * steps_per_epoch, steps_per_epoch)
    lines = [
        line for path in sorted((run_dir / "ledger").glob("segment-*.csv")) for line in path.read_text().split("\n")
    ]
    epoch_of = {int(line.split(",")[0]): int(line.split(",")[1]) for line in lines if re.match(r"\d+,", line)}
    applied = 0
    for line in lines:
        if not line.startswith("# made"):
            continue
        _, _, step, _, *items = line.split()
        order = SampleOrder(len(targets), 0, epoch_of[int(step)] - 1)
        gradient, count = np.zeros(5), 0
        for read, begin, end in (map(int, re.split("[:-]", item)) for item in items):
            ids = order.ids_between(begin, end)
            errors = inputs[ids] @ weights[read] - targets[ids]
            gradient, count = gradient + 2 * errors @ inputs[ids], count + len(ids)
        velocity = MOMENTUM * velocity + gradient / count
        in_epoch = applied - (epoch_of[int(step)] - 1) * len(targets)
        at = (epoch_of[int(step)] - 1) * steps_per_epoch + min(in_epoch // batch, steps_per_epoch - 1)
        weights[int(step)] = weights[int(step) - 1] - recipe.lr * schedule.factor(at) * velocity
        applied += count
    return weights[max(weights)]
