"""A recipe that notes what `now` is wherever its methods are called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from hvdtrain.torch import Recipe, option

FIELDS = ("step", "steps", "epoch", "epochs", "samples", "folder", "training", "rank", "size")


class Noted(Dataset[Any]):
    """10 training examples and 4 others."""

    def __init__(self, recipe: Noting, split: str) -> None:
        self.recipe, self.split = recipe, split

    def __len__(self) -> int:
        return 10 if self.split == "train" else 4

    def __getitem__(self, i: int) -> torch.Tensor:
        self.recipe.note(f"{self.split}[{i}]")
        return torch.tensor([float(i)], dtype=torch.float64)


@dataclass(kw_only=True)
class Noting(Recipe):
    """A line through the origin."""

    notes: str = option("", "folder for the notes of each rank")
    epochs: int = 2
    batch_size: int = 4
    lr: float = 0.01

    def note(self, where: str) -> None:
        found = {name: getattr(self.now, name) for name in FIELDS if hasattr(self.now, name)}
        found["folder"] = str(found["folder"])
        with (Path(self.notes) / f"rank-{self.now.rank}").open("a") as file:
            file.write(json.dumps([where, found]) + "\n")

    def model(self) -> torch.nn.Module:
        self.note("model")
        return torch.nn.Linear(1, 1, bias=False).double()

    def dataset(self, split: str) -> Any:
        self.note(f"dataset({split})")
        return Noted(self, split)

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        self.note("optimizer")
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.note("score")
        return {"loss": (model(batch)[:, 0] - batch[:, 0]).square()}


@dataclass(kw_only=True)
class AsksTooEarly(Noting):
    """Asks in `model` which step it is."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1 + self.now.step).double()


@dataclass(kw_only=True)
class Sets(Noting):
    """Three evaluation sets, of which one is empty; `best` is of the last one."""

    evals: ClassVar[tuple[str, ...]] = ("val", "test", "unused")
    best: ClassVar[tuple[str, Any]] = ("test/far", "max")

    def note(self, where: str) -> None:
        """Note nothing."""

    def dataset(self, split: str) -> Any:
        sizes = {"train": 10, "val": 5, "test": 7}
        if split not in sizes:
            return None
        offset = {"train": 0.0, "val": 1.0, "test": -2.0}[split]
        return torch.arange(sizes[split], dtype=torch.float64)[:, None] / 10 + offset

    def score(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        away = (model(batch)[:, 0] - batch[:, 0]).abs()
        return {"loss": away.square(), "far": away}


@dataclass(kw_only=True)
class NoSets(Sets):
    """No evaluation."""

    evals: ClassVar[tuple[str, ...]] = ()
    best: ClassVar[tuple[str, Any]] = ("nothing", "min")
