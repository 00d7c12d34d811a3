"""digits at two paces, so that what a cluster does in its own time can happen between two steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import option

Digits: Any = load_recipe("digits")


@dataclass(kw_only=True)
class PacedDigits(Digits):  # type: ignore[misc]
    """digits, slowly at first."""

    slowly: str = option("", "a file: as long as it is there, each pass takes half a second longer")

    def score(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if model.training and Path(self.slowly).is_file():
            time.sleep(0.5)
        return super().score(model, batch)  # type: ignore[no-any-return]
