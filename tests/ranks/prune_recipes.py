"""Recipes to prune, and the same training by plain torch in one process, in float64."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hvdtrain
from hvdtrain.recipe.order import iterate_batches
from hvdtrain.torch import Recipe
from hvdtrain.torch.tensors import read_tensors

EXAMPLES, BATCH = 30, 8  # four steps an epoch, the last of 6 examples
WEIGHTS = ("0.weight", "3.weight")  # what is pruned: 32 * 96 + 96 * 8 values
NUM_WEIGHTS = 40 * 96
CLIP = 0.5


@dataclass(kw_only=True)
class Sparse(Recipe):
    """Two layers and a norm, with momentum and weight decay."""

    epochs: int = 5
    batch_size: int = BATCH
    lr: float = 0.05

    def model(self) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(32, 96), nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 8)).double()

    def dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(len(split))
        return TensorDataset(*(torch.randn(EXAMPLES, n, generator=made, dtype=torch.float64) for n in (32, 8)))

    def optimizer(self, params: Any) -> Any:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=0.01)

    def score(self, model: Any, batch: Any) -> Any:
        return {"loss": (model(batch[0]) - batch[1]).square().mean(1)}


class Adaptive(Sparse):
    """In float32, with Adam."""

    def model(self) -> nn.Module:
        return super().model().float()

    def dataset(self, split: str) -> TensorDataset:
        return TensorDataset(*(x.float() for x in super().dataset(split).tensors))

    def optimizer(self, params: Any) -> Any:
        return torch.optim.AdamW(params, lr=self.lr / 10)


class Flat(Sparse):
    """Nothing to prune."""

    def model(self) -> nn.Module:
        return nn.LayerNorm(32).double()

    def score(self, model: Any, batch: Any) -> Any:
        return {"loss": (model(batch[0]) - 1).square().mean(1)}


class Rows(Adaptive):
    """An embedding with sparse gradients."""

    def model(self) -> nn.Module:
        torch.manual_seed(5)
        return nn.EmbeddingBag(50, 12, sparse=True)

    def dataset(self, split: str) -> TensorDataset:
        return TensorDataset(torch.randint(50, (EXAMPLES, 3), generator=torch.Generator().manual_seed(1)))

    def optimizer(self, params: Any) -> Any:
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model: Any, batch: Any) -> Any:
        return {"loss": (model(batch[0]) - 1).square().mean(1)}


def sparsity(step: int, final: float, begin: int, end: int) -> float:
    return final * (1 - (1 - min(max(step - begin, 0) / (end - begin), 1)) ** 3)


def train_plainly(final: float, begin: int, end: int, decay: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train in one process, clipped; the parameters and their averages at the end."""
    recipe = Sparse()
    net, data = recipe.model(), recipe.dataset("train").tensors
    optimizer, named = recipe.optimizer(net.parameters()), dict(net.named_parameters())
    kept = {name: torch.ones_like(named[name]) for name in WEIGHTS}
    average: dict[str, Tensor] = {}
    step = 0
    for epoch in range(recipe.epochs):
        for ids in iterate_batches(EXAMPLES, BATCH, 0, epoch):
            optimizer.zero_grad()
            recipe.score(net, [part[torch.from_numpy(ids)] for part in data])["loss"].mean().backward()
            for name in WEIGHTS:
                named[name].grad *= kept[name]  # type: ignore[operator]
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            step += 1
            with torch.no_grad():
                for name in WEIGHTS:
                    named[name] *= kept[name]
                now = {name: p.detach().clone() for name, p in named.items()}
                average = {name: decay * average[name] + (1 - decay) * now[name] for name in now} if average else now
                joined = np.concatenate([named[name].abs().numpy().ravel() for name in WEIGHTS])
                alive = np.concatenate([kept[name].numpy().ravel() for name in WEIGHTS])
                order = np.lexsort((joined, alive))  # pruned ones first, then the smallest; a stable sort
                alive[order[: round(sparsity(step, final, begin, end) * len(joined))]] = 0
                parts = np.split(alive, np.cumsum([kept[name].numel() for name in WEIGHTS])[:-1])
                for name, part in zip(WEIGHTS, parts, strict=True):
                    kept[name] = torch.from_numpy(part.reshape(kept[name].shape))
                    named[name] *= kept[name]
                    average[name] = average[name] * kept[name]
    return {name: p.detach() for name, p in named.items()}, average


def fit(recipe: Recipe, run_dir: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with hvdtrain on this world; the state at the end, and the summary."""
    summary = hvdtrain.fit(recipe, run_dir=run_dir, quiet=True, log_every=1, **options)
    return read_tensors((run_dir / "checkpoints" / f"step-{summary['steps']}" / "state").read_bytes()), summary


@dataclass(kw_only=True)
class SlowSparse(Sparse):
    """Slowly, until the fault file is there."""

    epochs: int = 12
    pause: float = 0.0
    fault: str = ""

    def score(self, model: Any, batch: Any) -> Any:
        if self.now.training and not (self.fault and Path(self.fault).exists()):
            time.sleep(self.pause)
        return super().score(model, batch)
