"""A recipe that takes longer on rank 1, as on a slow GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.torch import Recipe


@dataclass(kw_only=True)
class SlowRank(Recipe):
    """Least squares, without an evaluation."""

    batch_size: int = 4
    evals: ClassVar[tuple[str, ...]] = ()

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def dataset(self, split: str) -> Any:
        values = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.TensorDataset(values, values.sum(1))

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01)

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        inputs, targets = batch
        time.sleep(0.25 if collectives.rank() == 1 else 0.01)
        return {"loss": (model(inputs).squeeze(1) - targets).square()}
