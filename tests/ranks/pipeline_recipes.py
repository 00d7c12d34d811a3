"""Recipes for tests of --stages: shipped ones in float64, a chain with everything in it, and what is refused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import Recipe, all_gather, option
from tests.ranks.sharded_recipes import GlobalNorm

RECIPES = Path(__file__).parents[2] / "recipes"
Digits: Any = load_recipe(str(RECIPES / "digits.py"))
CharLM: Any = load_recipe(str(RECIPES / "charlm.py"))
Translate: Any = load_recipe(str(RECIPES / "translate.py"))


@dataclass(kw_only=True)
class Digits64(Digits):
    """In float64, few examples: 26 steps an epoch, the last one of 29 examples."""

    width: int = 4
    batch_size: int = 28
    epochs: int = 1
    lr: float = 0.02
    double: bool = option(True, "train in float64")

    def model(self) -> nn.Module:
        return super().model().double() if self.double else super().model()

    def dataset(self, split: str) -> TensorDataset:
        images, labels = super().dataset(split).tensors
        images, labels = images[: {"train": 117, "eval": 25}[split]], labels[:117]
        return TensorDataset(images.double() if self.double else images, labels[: len(images)])


@dataclass(kw_only=True)
class CharLM64(CharLM):
    """In float64: its embedding is its output layer, in the first stage and in the last."""

    width: int = 8
    heads: int = 2
    context: int = 16
    files: int = 10
    batch_size: int = 14

    def model(self) -> nn.Module:
        return super().model().double()

    def dataset(self, split: str) -> Tensor:
        return super().dataset(split)[:47]


@dataclass(kw_only=True)
class Translate64(Translate):
    """In float64: tensors of three kinds pass the stages, and translations are searched for in many passes."""

    width: int = 8
    layers: int = 1
    dropout: float = 0.0
    beams: int = 2
    epochs: int = 1
    batch_size: int = 14
    fixed_length: bool = True

    def model(self) -> nn.Module:
        return super().model().double()

    def dataset(self, split: str) -> list[tuple[str, str]]:
        return super().dataset(split)[: {"train": 31, "eval": 5}[split]]


class Mixed(nn.Module):
    """Returns a pair and takes one apart; writes in place; has a frozen part, and one that is not used."""

    def __init__(self, makes_pair: bool) -> None:
        super().__init__()
        self.makes_pair, self.linear = makes_pair, nn.Linear(6, 6)
        self.idle, self.fixed = nn.Linear(2, 2), nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, *given: Any) -> Any:
        x, mask = given if len(given) == 2 else given[0]
        y = self.linear(x) * mask.unsqueeze(1) * self.fixed
        return (y, mask) if self.makes_pair else y


class Net(nn.Module):
    """A module of two arguments, then a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Mixed(True)
        layers = [Mixed(True), Mixed(False), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 1)]
        self.rest = nn.Sequential(*layers)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.rest(self.first(x, mask))


@dataclass(kw_only=True)
class Chain(Recipe):
    """Two inputs, a mask that passes the stages, layers that write in place, and a pair as loss."""

    epochs: int = 2
    batch_size: int = 12
    lr: float = 0.05
    kind: str = option("sgd", "the optimizer: sgd or adamw")
    seeded: bool = option(False, "add noise in score")
    cuts: str = option("", "names of modules to cut after")

    def model(self) -> nn.Module:
        return Net().double()

    def dataset(self, split: str) -> TensorDataset:
        g = torch.Generator().manual_seed(len(split))
        x = torch.randn(31, 6, generator=g, dtype=torch.float64)
        return TensorDataset(x, (x[:, 0] > -1).double(), x.sum(1))

    def optimizer(self, params: list[nn.Parameter], named: Any) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for name, p in named if not name.endswith("weight")], "weight_decay": 0.0},
        ]
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        x, mask, y = batch
        if self.seeded:
            x = x + 0.1 * torch.randn_like(x)
        errors = (model(x, mask).squeeze(1) - y).square()
        return {"loss": (errors * mask, mask), "distance": errors.detach().sqrt()}


@dataclass(kw_only=True)
class CutChain(Chain):
    """Says where it is cut."""

    def stages(self, model: nn.Module) -> list[str]:
        return self.cuts.split(",")


@dataclass(kw_only=True)
class Dropping(Chain):
    """Draws random numbers in each stage, in blocks that can be recomputed."""

    dropout: float = option(0.4, "share that is dropped")

    def model(self) -> nn.Module:
        layers = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(self.dropout)) for _ in range(4)]
        return nn.Sequential(*layers, nn.Linear(6, 1)).double()

    def blocks(self, model: nn.Module) -> Any:
        return list(model)[:4]

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        x, _, y = batch
        return {"loss": (model(x).squeeze(1) - y).square()}


class Slow(nn.Module):
    """Takes its time, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return x * 1


@dataclass(kw_only=True)
class SlowStage(Dropping):
    """The second stage of two is slow."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), Slow(), nn.Linear(6, 1)).double()

    def stages(self, model: nn.Module) -> list[str]:
        return ["0"]


@dataclass(kw_only=True)
class Failing(Dropping):
    """Fails in its second step, where scores are computed."""

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        scores = super().score(model, batch)
        if self.now.step == 1 and self.now.training:
            raise ValueError("no more")
        return scores


@dataclass(kw_only=True)
class Dying(Dropping):
    """The process that computes scores is killed in its second step."""

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        scores = super().score(model, batch)
        if self.now.step == 1 and self.now.training and self.now.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores


@dataclass(kw_only=True)
class Mortal(Chain):
    """Ranks die in chosen steps, STEP:RANK, each once, where `score` is called: on first and last stages."""

    epochs: int = 8
    faults: str = option("", "when who dies, as 2:3,5:0")
    pause: float = option(0.0, "seconds that each pass takes longer")
    fault: str = option("", "a file next to which deaths are noted; its .hold holds the run")

    def stages(self, model: nn.Module) -> list[str]:
        return ["rest.1"]

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        if self.now.training and self.fault:
            time.sleep(self.pause)
            for fault in filter(None, self.faults.split(",")):
                mark = Path(f"{self.fault}.{fault.replace(':', '.')}")
                if fault == f"{self.now.step}:{self.now.rank}" and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            deadline = time.monotonic() + 2
            while Path(f"{self.fault}.hold").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        return super().score(model, batch)


# What is refused before the first step: the class, and what score or the model does.


@dataclass(kw_only=True)
class Twice(Dropping):
    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        return {"loss": (model(batch[0]) + model(batch[0])).squeeze(1)}


@dataclass(kw_only=True)
class Keywords(Dropping):
    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        return {"loss": model(input=batch[0]).squeeze(1)}


@dataclass(kw_only=True)
class Attribute(Dropping):
    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        penalty = sum(p.square().sum() for p in model.parameters())
        return {"loss": model(batch[0]).squeeze(1) + penalty}


@dataclass(kw_only=True)
class Past(Dropping):
    def model(self) -> nn.Module:
        self.network = super().model()
        return self.network

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        return {"loss": model(batch[0]).squeeze(1) * self.network[4].bias}


@dataclass(kw_only=True)
class Detached(Dropping):
    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        return {"loss": model(batch[0]).detach().squeeze(1) + 0 * self.network[4].weight.sum()}

    def model(self) -> nn.Module:
        self.network = super().model()
        return self.network


@dataclass(kw_only=True)
class Transposed(Dropping):
    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        return {"loss": model(batch[0].T.repeat(1, 3)[:, :6]).sum(1)[:1].expand(len(batch[0]))}


@dataclass(kw_only=True)
class Ragged(Dropping):
    """Examples of another shape later on."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(1), nn.Linear(1, 1))


@dataclass(kw_only=True)
class Normed(Dropping):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x + self.one(x))


@dataclass(kw_only=True)
class Skipping(Dropping):
    def model(self) -> nn.Module:
        return Residual().double()


@dataclass(kw_only=True)
class Frozen(Dropping):
    def model(self) -> nn.Module:
        model = super().model()
        model[:2].requires_grad_(False)
        return model

    def stages(self, model: nn.Module) -> list[str]:
        return ["0"]


@dataclass(kw_only=True)
class Adversarial(Dropping):
    def optimizer(self, params: list[nn.Parameter], named: Any) -> Any:
        return {"loss": torch.optim.SGD(params[:2], lr=0.1), "other": torch.optim.SGD(params[2:], lr=0.1)}

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        y = model(batch[0]).squeeze(1)
        return {"loss": y, "other": -y}


@dataclass(kw_only=True)
class WholeNorm(Dropping):
    def optimizer(self, params: list[nn.Parameter], named: Any) -> torch.optim.Optimizer:
        return GlobalNorm(params, lr=self.lr)


@dataclass(kw_only=True)
class Gathering(Dropping):
    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Any]:
        y = model(batch[0])
        return {"loss": y.squeeze(1) - all_gather(y).mean()}


@dataclass(kw_only=True)
class Ending(Dropping):
    def evaluated(self, model: nn.Module, metrics: dict[str, Any]) -> bool:
        return True


@dataclass(kw_only=True)
class Remembering(Dropping):
    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


# What is summarised: outputs that several passes compute, or that score returns.


@dataclass(kw_only=True)
class Summarising(Chain):
    def outputs(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        twice = torch.cat([batch[0], batch[0]]), torch.cat([batch[1], batch[1]])  # more than a micro-batch
        return {"y": model(*twice)[: len(batch[0])] + model(batch[0] + 1, batch[1])}

    def summarise(self, outputs: dict[str, Any]) -> dict[str, float]:
        return {"mean": float(outputs["y"].mean())}


@dataclass(kw_only=True)
class Returning(Summarising):
    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> Any:
        x, mask, y = batch
        found = model(x, mask).squeeze(1)
        return {"loss": (found - y).square()}, {"y": found}
