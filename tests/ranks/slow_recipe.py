"""digits at a pace at which faults can be injected between two steps; it can fail on purpose."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import option

Digits: Any = load_recipe("digits")


@dataclass(kw_only=True)
class SlowDigits(Digits):  # type: ignore[misc]
    """digits, slowly."""

    pause: float = option(0.05, "seconds that each pass takes longer, until the fault file says hurry, or slow")
    fault: str = option(
        "", "a file that says what to do next: init-crash, init-hang, score-once, score-always, sync-..."
    )
    epochs: int = 6

    def model(self) -> torch.nn.Module:
        if self.said("init-crash"):
            os._exit(9)
        if self.said("init-hang"):
            time.sleep(3600)
        model: torch.nn.Module = super().model()
        model.register_state_dict_pre_hook(self.hand_over)  # type: ignore[no-untyped-call]
        return model

    def hand_over(self, *_: object) -> None:
        """Before the state is written, for a checkpoint or for the others."""
        if self.said("sync-crash"):
            Path(self.fault).unlink()
            os._exit(9)
        if self.said("sync-wait"):
            Path(self.fault).unlink()
            time.sleep(3)

    def score(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if model.training:
            self.take(0 if self.said("hurry") else 6 if self.said("slow") else self.pause)
            if self.said("score-once"):
                Path(self.fault).unlink(missing_ok=True)
                raise ValueError("a fault on purpose, once")
            if self.said("score-always"):
                raise ValueError("a fault on purpose, always")
        return super().score(model, batch)  # type: ignore[no-any-return]

    def take(self, seconds: float) -> None:
        """Sleep; up to 2 s more while the job holds the run until newcomers have joined."""
        time.sleep(seconds)
        deadline = time.monotonic() + 2
        while self.fault and Path(f"{self.fault}.hold").exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def said(self, fault: str) -> bool:
        return bool(self.fault) and Path(self.fault).exists() and Path(self.fault).read_text() == fault
