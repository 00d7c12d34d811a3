"""Recipes with blocks that can be recomputed, and some that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hvdtrain
from hvdtrain.torch import Recipe, all_gather
from hvdtrain.torch.tensors import read_tensors

BUILT: list[nn.Module] = []  # the models that recipes have made in this process


class Block(nn.Module):
    """Draws from torch's generator and numpy's; `shift` is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.3), nn.Linear(12, 6))
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        kept = float(np.random.random() < 0.8) if self.training else 1.0
        return x + kept * self.scale * self.layers(x + shift)


class Net(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift=x.mean())
        return self.head(x).squeeze(1)


@dataclass(kw_only=True)
class Stack(Recipe):
    """Four blocks with dropout."""

    epochs: int = 1
    batch_size: int = 6
    lr: float = 0.01

    def model(self) -> nn.Module:
        BUILT.append(Net([Block() for _ in range(4)]))
        return BUILT[-1]

    def blocks(self, model: nn.Module) -> Any:
        return model.blocks

    def dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(len(split))
        x = torch.randn(23, 6, generator=made)
        return TensorDataset(x, x.sum(1))

    def optimizer(self, params: Any) -> Any:
        return torch.optim.AdamW(params, lr=self.lr)

    def score(self, model: Any, batch: Any) -> Any:
        return {"loss": (model(batch[0]) - batch[1]).square()}


class Gathers(Stack):
    """What a block gathers, it gathers again."""

    def model(self) -> nn.Module:
        class Gathering(Block):
            def forward(self, x: Tensor, shift: Tensor) -> Tensor:
                return super().forward(x, shift + all_gather(x).mean())

        return Net([Gathering() for _ in range(2)])


class Containers(Stack):
    """A block reads its input from a dict, and puts its output there: what was in it is read again."""

    def model(self) -> nn.Module:
        class Reading(Block):
            def forward(self, x: dict[str, Any], shift: Tensor) -> dict[str, Any]:  # type: ignore[override]
                x["at"] = super().forward(x["at"], shift)
                x["seen"].append(x["at"].mean())
                return x

        class ReadingNet(Net):
            def forward(self, x: Tensor) -> Tensor:
                state: dict[str, Any] = {"at": x, "seen": []}
                for block in self.blocks:
                    state = block(state, shift=state["at"].mean())
                    state["at"] = state["at"].sin()
                return self.head(state["at"]).squeeze(1) + sum(state["seen"])

        return ReadingNet([Reading() for _ in range(4)])


class DoublingFirst(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return xs[0].sin() + xs[0].mul_(2).detach()


class GivingList(nn.Sequential):
    def forward(self, x: Tensor, shift: Tensor) -> Any:
        return self[0]([x.clone()])


class Several(Stack):
    """Two losses that share the graph of the blocks."""

    def optimizer(self, params: Any) -> Any:
        return {"loss_a": torch.optim.SGD(params[:8], lr=self.lr), "loss_b": torch.optim.Adam(params[8:], lr=self.lr)}

    def score(self, model: Any, batch: Any) -> Any:
        y = model(batch[0])
        return {"loss_a": (y - batch[1]).square(), "loss_b": (y + batch[1]).square()}


@dataclass(kw_only=True)
class Wrong(Stack):
    """Blocks that cannot be recomputed: `how` says why."""

    how: str = ""

    def model(self) -> nn.Module:
        class Plain(nn.Sequential):
            def forward(self, x: Tensor, shift: Tensor) -> Tensor:
                return super().forward(x)

        class Counting(Plain):
            calls = 0

            def forward(self, x: Tensor, shift: Tensor) -> Tensor:
                self.calls += 1
                return super().forward(x, shift).sin() if self.calls % 2 else super().forward(x, shift)

        class CountingValues(Counting):
            def forward(self, x: Tensor, shift: Tensor) -> Tensor:
                self.calls += 1
                return self[0](x) * (1 + 0.5 * (self.calls % 2))  # type: ignore[no-any-return]

        def make_block() -> nn.Module:
            if self.how == "counts values":
                return CountingValues(nn.Linear(6, 6))
            if self.how == "batch norm":
                return Plain(nn.Linear(6, 6), nn.BatchNorm1d(6))
            if self.how == "in place":
                return Plain(nn.ReLU(inplace=True))
            if self.how == "in a list":
                return GivingList(DoublingFirst())
            return Counting(nn.Linear(6, 6)) if self.how == "counts" else Plain(nn.Linear(6, 6))

        return Net([make_block(), make_block()])

    def blocks(self, model: Any) -> Any:
        choices = {
            "foreign": [nn.Linear(6, 6)],
            "in a list": [model.blocks[0][0]],
            "twice": [model.blocks[0], model.blocks[0]],
            "nested": [model.blocks[0][0], model.blocks[1], model.blocks[0]],
            "list": [model.blocks],
            "none": [],
            "generator": (block for block in model.blocks),
        }
        return choices.get(self.how, list(model.blocks))


def fit(recipe: Recipe, run_dir: Path, **options: Any) -> dict[str, Any]:
    """Train with hvdtrain on this world; the state at the end."""
    summary = hvdtrain.fit(recipe, run_dir=run_dir, quiet=True, **options)
    state = read_tensors((run_dir / "checkpoints" / f"step-{summary['steps']}" / "state").read_bytes())
    return {"state": state, "loss": summary["train_loss"], "eval": summary["eval"]}
