"""Recipes for tests of --tensor and --shard model: small models in float64, with ragged batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hvdtrain.exchange.local_tensors import is_split_dtensor, local_tensor
from hvdtrain.torch import Recipe, all_gather, option
from recipes.digits import Digits
from recipes.translate import Translate

TYPES = {"float32": torch.float32, "float64": torch.float64}
OPTIMIZERS = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
    "adagrad": lambda groups, lr: torch.optim.Adagrad(groups, lr=lr),
    "adafactor": lambda groups, lr: torch.optim.Adafactor(groups, lr=lr),
}


class Block(nn.Module):
    """A perceptron with a residual connection, (B, 6) -> (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Network(nn.Module):
    """(B, 5) -> (B, 1)"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(5, 6), nn.ModuleList([Block(), Block()]), nn.Linear(6, 1)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x) * self.scale


@dataclass(kw_only=True)
class Divided(Recipe):
    """A network with blocks and layers that can be split."""

    kind: str = option("sgd", "optimizer")
    dtype: str = option("float64", "type of all parameters")
    rows: int = option(13, "examples")
    epochs: int = 2
    batch_size: int = 6
    lr: float = 0.02

    def model(self) -> nn.Module:
        self.network = Network().to(TYPES[self.dtype])
        return self.network

    def dataset(self, split: str) -> Dataset[Any]:
        made = torch.Generator().manual_seed(1 if split == "train" else 2)
        inputs = torch.randn(self.rows if split == "train" else 5, 5, generator=made, dtype=torch.float64)
        return TensorDataset(inputs.to(TYPES[self.dtype]), inputs.sum(1, keepdim=True).to(TYPES[self.dtype]))

    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in params if (p.ndim > 1) == matrix]} for matrix in (True, False)]
        self.made = OPTIMIZERS[self.kind](groups, self.lr)
        return self.made

    def score(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Any]:
        inputs, targets = batch
        if "HVDTRAIN_TEST_OUT" in os.environ and not self.now.training:
            self.write_held(Path(os.environ["HVDTRAIN_TEST_OUT"]))
        loss = (model(inputs) - targets).square().squeeze(1)
        return {"loss": (loss, inputs[:, 0].abs() + 1)}

    def write_held(self, folder: Path) -> None:
        """Write what this rank holds: its parameters in training, and the bytes of the optimizer's state."""
        groups = [group["params"] for group in self.made.param_groups]
        held = [local_tensor(p.detach()).clone() for params in groups for p in params]
        states = [value for kept in self.made.state.values() for value in kept.values() if torch.is_tensor(value)]
        split = [is_split_dtensor(p) for params in groups for p in params]
        written = {"held": held, "split": split, "state_bytes": sum(t.nbytes for t in states if t.dim())}
        torch.save(written, folder / f"held{self.now.rank}")

    def blocks(self, model: nn.Module) -> Any:
        return model.blocks

    def split_plan(self) -> dict[str, Any]:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


@dataclass(kw_only=True)
class Outputs(Divided):
    """Computes outputs by methods of the model, in a loop whose length depends on the examples."""

    best = ("squares", "min")

    def outputs(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
        x, count = model.first(batch[0]), 0
        while (small := x.norm(dim=1, keepdim=True) < 10).any() and count < 50:
            x, count = torch.where(small, 1.5 * model.blocks[0](x), x), count + 1
        return {"found": x}

    def summarise(self, outputs: dict[str, Any]) -> dict[str, float]:
        return {"squares": float((outputs["found"] ** 2).sum())}


class Plain(Recipe):
    """Neither blocks nor a plan."""

    model, dataset, optimizer, score = Divided.model, Divided.dataset, Divided.optimizer, Divided.score
    kind, dtype, rows, write_held = "sgd", "float64", 13, Divided.write_held


class Norm(Divided):
    """Has batch norm."""

    def model(self) -> nn.Module:
        network = super().model()
        network.norm = nn.BatchNorm1d(6)
        return network


class Unknown(Divided):
    """Names modules that there are not."""

    def split_plan(self) -> dict[str, Any]:
        return {"layers.*": next(iter(super().split_plan().values()))}


class NoStyle(Divided):
    """Has a plan of texts."""

    def split_plan(self) -> dict[str, Any]:
        return {"first": "column"}


class Odd(Divided):
    """Splits what has one row."""

    def split_plan(self) -> dict[str, Any]:
        return {"last": next(iter(super().split_plan().values()))}


class NothingSplit(Divided):
    """Has a plan that splits activations only."""

    def split_plan(self) -> dict[str, Any]:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import PrepareModuleInput

        return {"first": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())}


class Freezes(Divided):
    """Freezes a layer in the second step."""

    def score(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Any]:
        if self.now.training and self.now.step == 1:
            model.get_parameter("first.weight").requires_grad_(False)
        return super().score(model, batch)


class NoGraph(Divided):
    """Has a loss without a gradient in the second step."""

    def score(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Any]:
        loss, weights = super().score(model, batch)["loss"]
        return {"loss": (loss.detach() if self.now.step else loss, weights)}


class Several(Divided):
    """Has two optimizers."""

    def optimizer(self, params: list[nn.Parameter]) -> dict[str, torch.optim.Optimizer]:  # type: ignore[override]
        return {f"loss_{name}": torch.optim.SGD(params[i::2], lr=self.lr) for i, name in enumerate("ab")}


class Calls(Divided):
    """Calls Horovod itself."""

    def score(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Any]:
        hvd.allreduce(torch.ones(1), name="own")
        return super().score(model, batch)


class Tied(Divided):
    """Two blocks have one norm."""

    def model(self) -> nn.Module:
        network = super().model()
        network.blocks[1].norm = network.blocks[0].norm
        return network


class Gathers(Divided):
    """Gathers all ranks' outputs."""

    def score(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Any]:
        scores = super().score(model, batch)
        all_gather(scores["loss"][0])
        return scores


class Methods(Divided):
    """Calls a layer that is in no block, without the model."""

    def score(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Any]:
        return {"loss": model.first(batch[0]).sum(1)}


class SplitDigits(Digits):
    """A perceptron on digits, whose layers can be split and are a chain."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def split_plan(self) -> dict[str, Any]:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        return {"1": ColwiseParallel(), "3": RowwiseParallel()}


class WithoutBleu(Translate):
    """Translates nothing in evaluations, which takes a minute."""

    best = ("loss", "min")
    outputs, summarise = Recipe.outputs, Recipe.summarise
