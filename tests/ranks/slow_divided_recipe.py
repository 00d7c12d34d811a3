"""The slow digits with layers that ranks can hold together; a rank can be lost in the middle of a pass, too."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.ranks.slow_stages_recipe import SlowStages


@dataclass(kw_only=True)
class SlowDivided(SlowStages):
    """digits, slowly, with a layer more; the fault file may say backward or evaluate: rank 3 of 4 is lost there."""

    width: int = 8

    def model(self) -> nn.Module:
        model: Any = super().model()
        model[7] = nn.Sequential(nn.Linear(8 * self.width, 30), nn.Tanh(), nn.Linear(30, 10))
        return model  # type: ignore[no-any-return]

    def blocks(self, model: Any) -> list[nn.Module]:
        return [model[0], model[3], model[7]]

    def split_plan(self) -> dict[str, Any]:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        return {"7.0": ColwiseParallel(), "7.2": RowwiseParallel()}

    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr)

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if not model.training:
            self.lose_rank("evaluate")
        hidden: list[torch.Tensor] = []
        hook = model[3].register_forward_hook(lambda module, inputs, output: hidden.append(output))  # type: ignore[index, union-attr]
        scores = super().score(model, batch)
        hook.remove()
        if hidden[0].requires_grad:  # once the last layers have gone back
            hidden[0].register_hook(lambda gradient: self.lose_rank("backward"))
        return scores

    def lose_rank(self, fault: str) -> None:
        if self.said(fault) and (self.now.rank, self.now.size) == (3, 4):
            Path(self.fault).unlink()
            os._exit(9)
