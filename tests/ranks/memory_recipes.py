"""Recipes that remember something, rightly and wrongly, or set their learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ending_early_recipes import Wave

from hvdtrain.torch import option


@dataclass(kw_only=True)
class Memory(Wave):
    """Remembers its passes in training, on rank 0 from 100 on; rank 0's counts after a resume."""

    kind: str = option("", "what state returns besides")

    def model(self) -> torch.nn.Module:
        self.count, self.table = 100 * (self.now.rank == 0), torch.zeros(3)
        return super().model()

    def state(self) -> Any:
        odd: dict[str, Any] = {
            "array": {"list": [1, np.zeros(2)]},
            "key": {1: 2},
            "numpy number": np.float32(1),
        }
        if self.kind == "list":
            return [1]
        return {"count": np.float64(self.count), "table": self.table[:2], "odd": odd.get(self.kind)}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.kind == "raises":
            raise KeyError("old")
        assert state["table"].tolist() == [state["count"] - 100] * 2 and type(state["count"]) is float
        self.count, self.table = int(state["count"]), torch.cat([state["table"], torch.zeros(1)])

    def score(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if model.training:
            self.count += 1
            self.table[:2] += 1
        scores = super().score(model, batch)
        return {**scores, "count": torch.full_like(scores["loss"], self.count).detach()}


@dataclass(kw_only=True)
class Forgetting(Wave):
    """Has no memory."""


@dataclass(kw_only=True)
class OneSided(Wave):
    """Can only write."""

    def state(self) -> dict[str, Any]:
        return {}


@dataclass(kw_only=True)
class OwnRate(Wave):
    """Sets its learning rate by itself, or wrongly."""

    kind: str = option("", "what goes wrong")

    def lr_factor(self, now: Any) -> Any:
        assert now is self.now and now.training
        if self.kind == "ranks differ" and now.step == 1:
            return 1.0 + now.rank
        if self.kind == "raises":
            raise ZeroDivisionError("no")
        return {"nan": float("nan"), "negative": -1, "none": None}.get(self.kind, np.float32(1 / (1 + now.step)))
