"""The slow recipe with an order of each epoch that no other process could draw again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvdtrain.recipe.registry import load_recipe
from tests.ranks.elastic import RECIPE

SlowDigits: Any = load_recipe(RECIPE)


@dataclass(kw_only=True)
class SampledDigits(SlowDigits):  # type: ignore[misc]
    """digits, slowly, 640 examples an epoch, drawn from the system's randomness."""

    def sampler(self, split: str, epoch: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng().integers(0, 1437, 640))
