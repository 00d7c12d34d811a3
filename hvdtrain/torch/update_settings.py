"""What the losses of a recipe have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.torch.pruning import Pruner


@dataclass(frozen=True)
class UpdateSettings:
    """What the losses of a recipe have in common.

    Attributes:
        recipe_name: the class.
        model: whose parameters the optimizers have.
        options: of the run.
        scaler: of --amp fp16.
        losses: the names of the scores that are minimized, in order.
        several: whether each loss is differentiated by its own optimizer's parameters only, and may be left out of a
            step.
        pruner: of --prune.
    """

    recipe_name: str
    model: nn.Module
    options: StepOptions
    scaler: torch.amp.GradScaler | None
    losses: tuple[str, ...]
    several: bool
    pruner: Pruner | None
