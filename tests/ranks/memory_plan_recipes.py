"""Recipes so small that the bytes of their layouts can be counted by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hvdtrain.torch import Recipe


@dataclass(kw_only=True)
class Counted(Recipe):
    """58 values in four parameters, 6 examples of 4 values."""

    epochs: int = 1
    batch_size: int = 6
    lr: float = 0.1

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def dataset(self, split: str) -> TensorDataset | None:
        return TensorDataset(torch.randn(6, 4), torch.randn(6, 2)) if split == "train" else None

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr)

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": (model(x) - y).square().sum(1)}


@dataclass(kw_only=True)
class Blocks(Counted):
    """Three blocks, which can be recomputed."""

    width: int = 16

    def model(self) -> nn.Module:
        def block() -> nn.Module:
            width = self.width
            return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())

        blocks = [block() for _ in range(3)]
        return nn.Sequential(nn.Linear(4, self.width), *blocks, nn.Linear(self.width, 2))

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model[1:-1])


class ByNorm(torch.optim.SGD):
    """Divides by the norm of all gradients: no part of it can be updated alone."""

    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
        for p in params:
            assert p.grad is not None
            p.grad /= norm
        super().step()


@dataclass(kw_only=True)
class Normed(Counted):
    """An optimizer that cannot be divided."""

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return ByNorm(params, lr=self.lr)
