"""Recipes that end their training by themselves, and take rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hvdtrain
from hvdtrain.torch import Recipe, option


@dataclass(kw_only=True)
class Wave(Recipe):
    """One weight that goes down, below its target and beyond: the loss falls at first and rises then."""

    epochs: int = 50
    batch_size: int = 5
    lr: float = 0.1

    def model(self) -> torch.nn.Module:
        model = torch.nn.Linear(1, 1, bias=False).double()
        torch.nn.init.constant_(model.weight, 1.0)
        return model

    def dataset(self, split: str) -> Any:
        return torch.ones(10 if split == "train" else 3, 1, dtype=torch.float64)

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = model(batch)[:, 0]
        return {"loss": weight if model.training else weight.abs()}


@dataclass(kw_only=True)
class Stops(Wave):
    """Ends its training once the loss was not better for some evaluations; notes what it is given."""

    notes: str = option("", "folder for the notes of each rank")
    evaluations: int = option(2, "evaluations without a better loss")
    kind: str = option("", "what goes wrong")

    def model(self) -> torch.nn.Module:
        self.best_loss, self.bad = float("inf"), 0
        return super().model()

    def evaluated(self, model: Any, metrics: dict[str, Any]) -> Any:
        if self.kind == "raises" and self.now.rank == 1:
            raise ValueError("cannot draw")
        if self.kind == "returns a text":
            return "yes"
        if self.kind == "ranks differ":
            return self.now.rank == 1
        self.bad = 0 if metrics["loss"] < self.best_loss else self.bad + 1
        self.best_loss = min(self.best_loss, metrics["loss"])
        seen = {"step": self.now.step, "training": model.training, "weight": model.weight.item(), **metrics}
        with (Path(self.notes) / f"evaluated-{self.now.rank}").open("a") as file:
            file.write(json.dumps({**seen, "random": float(torch.rand(()))}) + "\n")
        return self.bad >= self.evaluations

    def logged(self, row: dict[str, Any]) -> None:
        with (Path(self.notes) / f"logged-{self.now.rank}").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.kind == "logged raises" and row["step"] == 4:
            raise OSError("no route to tracker")


@dataclass(kw_only=True)
class Draws(Wave):
    """Writes an image and a text after each evaluation, from all ranks alike; and a number in each pass."""

    def evaluated(self, model: Any, metrics: dict[str, Any]) -> bool:
        with hvdtrain.tensorboard(self) as writer:
            writer.add_image("weights", torch.full((3, 4, 4), 0.5))
            writer.add_text("note", f"loss {metrics['loss']:.3f}", self.now.step + 100)
        return False

    def score(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if model.training:
            hvdtrain.tensorboard(self).add_scalar("own/passes", 1.0)
        return super().score(model, batch)


@dataclass(kw_only=True)
class Saliency(Wave):
    """Differentiates the model after each evaluation, on each rank more often than on the one before."""

    def evaluated(self, model: Any, metrics: dict[str, Any]) -> bool:
        for _ in range(self.now.rank + 1):
            model(torch.ones(2, 1, dtype=torch.float64)).sum().backward()
        return False
