"""Recipes for tests of --shard optimizer: a small network in each type, with optimizers of each kind."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hvdtrain.torch import Recipe, option

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class GlobalNorm(torch.optim.SGD):
    """Divides the gradients by the norm of all of them together."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient /= norm
        super().step()  # type: ignore[no-untyped-call]


class Lars(torch.optim.SGD):
    """Scales each parameter's gradient by the ratio of the two norms (You et al., 1708.03888)."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad *= 0.1 * p.detach().norm() / (p.grad.norm() + 1e-6)
        super().step()  # type: ignore[no-untyped-call]


class Network(nn.Module):
    """Writes how many bytes of state this rank's optimizer has when an evaluation begins."""

    optimizer: torch.optim.Optimizer

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(7, 31), nn.Tanh(), nn.Linear(31, 13, bias=False), nn.Tanh(), nn.LayerNorm(13)]
        self.body = nn.Sequential(*layers, nn.Linear(13, 1))
        self.extra, self.frozen = nn.Linear(7, 1), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def eval(self) -> Any:
        if folder := os.environ.get("HVDTRAIN_TEST_OUT"):
            import horovod.torch as hvd

            tensors = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
            found = sum(tensor.nbytes for tensor in tensors if tensor.dim())
            (Path(folder) / f"bytes{hvd.rank()}.json").write_text(json.dumps(found))
        return super().eval()


@dataclass(kw_only=True)
class Sharded(Recipe):
    """A network of uneven layers; one is used in odd steps only, one is frozen."""

    epochs: int = 1
    batch_size: int = 28
    lr: float = 0.01
    kind: str = option("adamw", "the optimizer")
    dtype: str = option("float32", "of the parameters")
    skips: bool = option(False, "whether a layer is left out of even steps")

    def model(self) -> nn.Module:
        return Network().to(TYPES[self.dtype])

    def dataset(self, split: str) -> Dataset[Any]:
        made = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(300 if split == "train" else 50, 7, generator=made, dtype=torch.float64)
        targets = inputs.sin().sum(1) + 0.1 * torch.randn(len(inputs), generator=made, dtype=torch.float64)
        return TensorDataset(inputs.to(TYPES[self.dtype]), targets.to(TYPES[self.dtype]))

    def optimizer(self, params: list[nn.Parameter]) -> Any:
        groups = [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() < 2]}]
        groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
        made: Any = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.1),
            "sgd": lambda: torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=0.01),
            "adagrad": lambda: torch.optim.Adagrad(groups, lr=self.lr),
            "adafactor": lambda: torch.optim.Adafactor(groups, lr=self.lr),
            "lars": lambda: Lars(groups, lr=self.lr, momentum=0.9),
            "global": lambda: GlobalNorm(groups, lr=self.lr),
        }[self.kind]()
        self.made = made
        return made

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        model.optimizer = self.made
        inputs, targets = batch
        outputs = model.body(inputs).squeeze(1)
        if not self.skips or self.now.step % 2:
            outputs = outputs + model.extra(inputs).squeeze(1)
        return {"loss": (outputs - targets).float().square()}


@dataclass(kw_only=True)
class Spoiled(Sharded):
    """The gradient of the first layer is not finite on the last rank in step 3."""

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        scores = super().score(model, batch)
        if model.training and self.now.step == 2 and self.now.rank == self.now.size - 1:
            weight = model.body[0].weight
            scores["loss"] = scores["loss"] + SpoilGradient.apply(weight)
        return scores


class SpoilGradient(torch.autograd.Function):
    """0, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].new_full(ctx.shape, float("inf"))
