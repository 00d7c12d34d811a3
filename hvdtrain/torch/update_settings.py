"""What the losses of a recipe have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.pruning import Pruner

if TYPE_CHECKING:
    from hvdtrain.torch.stage_gradients import StageGradients


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
        stages: what ranks with other stages of the model do together with gradients; None: there are none.
        tables: embedding tables of which each rank has some rows; None: there are none.
    """

    recipe_name: str
    model: nn.Module
    options: StepOptions
    scaler: torch.amp.GradScaler | None
    losses: tuple[str, ...]
    several: bool
    pruner: Pruner | None
    tables: DealtTables | None = None
    stages: StageGradients | None = None

    def compute_norm(self, params: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of the model, (). params: those that this rank has, of an optimizer."""
        if self.stages is not None:
            return self.stages.compute_norm(params)
        return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
