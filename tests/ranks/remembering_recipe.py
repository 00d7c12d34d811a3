"""digits at a pace that remembers how often it was called in training, and scores that and what `now` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from slow_recipe import SlowDigits


@dataclass(kw_only=True)
class Remembering(SlowDigits):
    """One pass a rank and step: the count is the number of the step."""

    def model(self) -> torch.nn.Module:
        self.count, self.seen = 0, torch.zeros(2, dtype=torch.int64)
        return super().model()

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "seen": self.seen, "more": [{"none": None}, [0.5, "text"]]}

    def load_state(self, state: dict[str, Any]) -> None:
        assert state["more"] == [{"none": None}, [0.5, "text"]]
        self.count, self.seen = state["count"], state["seen"]

    def score(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if model.training:
            self.count += 1
            self.seen += 1
        scores = super().score(model, batch)
        loss = scores["loss"]
        told = {"count": self.count, "seen": int(self.seen[1]), "now_step": self.now.step, "now_size": self.now.size}
        return {**scores, **{name: torch.full_like(loss, value).detach() for name, value in told.items()}}
