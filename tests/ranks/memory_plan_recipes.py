"""Recipes so small that the bytes of their layouts can be counted by hand."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hvdtrain.exchange.local_tensors import local_tensor
from hvdtrain.torch import Recipe
from tests.ranks.table_recipes import Dealt


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


def write_held(recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the bytes of what this rank holds of the model and of the optimizer's state, once there is some."""
    if recipe.now.step == 1:
        tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}.values()
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        found = [sum(local_tensor(x).nbytes for x in some) for some in (tensors, states)]
        (Path(os.environ["HVDTRAIN_TEST_OUT"]) / f"held{recipe.now.rank}").write_text(json.dumps(found))


@dataclass(kw_only=True)
class Holding(Blocks):
    """Writes what each rank holds; the first of two stages has more. The loss is a pair."""

    epochs: int = 3

    def model(self) -> nn.Module:
        self.network = super().model()
        return self.network

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        self.made = super().optimizer(params)
        return self.made

    def stages(self, model: Any) -> list[str]:
        return ["2"]

    def split_plan(self) -> dict[str, Any]:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        return {"[123].0": ColwiseParallel(), "[123].2": RowwiseParallel()}

    def score(self, model: nn.Module, batch: Any) -> Any:
        if "HVDTRAIN_TEST_OUT" in os.environ:
            write_held(self, self.network, self.made)
        loss = super().score(model, batch)["loss"]
        return {"loss": (loss, torch.ones_like(loss))}


@dataclass(kw_only=True)
class HoldingTables(Dealt):
    """Has tables, and writes what each rank holds."""

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        self.updates = torch.optim.Adagrad(params, lr=self.lr)
        return self.updates

    def score(self, model: nn.Module, batch: Any) -> Any:
        if "HVDTRAIN_TEST_OUT" in os.environ:
            write_held(self, self.made, self.updates)
        return super().score(model, batch)


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
