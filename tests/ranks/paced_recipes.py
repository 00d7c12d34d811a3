"""Recipes for shares of the batch: one rank is slow at each example, or no rank is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdtrain.comm import collectives
from hvdtrain.torch import option
from tests.ranks.exact_recipe import Exact
from tests.ranks.slow_recipe import SlowDigits

PACE = 0.004  # seconds of an example


def is_last() -> bool:
    return collectives.rank() == collectives.size() - 1


@dataclass(kw_only=True)
class Paced(Exact):
    """Least squares in float64; the last rank takes twice as long as the others for each example."""

    batch_size: int = 40

    def score(self, model: Any, batch: Any) -> Any:
        if model.training and torch.is_grad_enabled():
            time.sleep(len(batch[0]) * PACE * (1 + is_last()))
        return super().score(model, batch)


@dataclass(kw_only=True)
class Noted(Exact):
    """Writes how many examples each pass of each rank has."""

    noted: str = option("", "the folder to write to")

    def score(self, model: Any, batch: Any) -> Any:
        if model.training and torch.is_grad_enabled():
            with Path(self.noted, f"rank{collectives.rank()}").open("a") as file:
                file.write(f"{len(batch[0])}\n")
        return super().score(model, batch)


@dataclass(kw_only=True)
class PacedDigits(SlowDigits):
    """digits in an elastic run; the last rank takes twice as long as the others for each example."""

    def score(self, model: Any, batch: Any) -> Any:
        if model.training and not self.said("hurry"):
            time.sleep(len(batch[1]) * 0.002 * (1 + is_last()))
        return super().score(model, batch)
