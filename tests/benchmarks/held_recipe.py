"""A network whose ranks are held to a part of a core each, for tests.benchmarks.uneven."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from hvdtrain.torch import Recipe

WIDTH, ROWS = 768, 1024
STEPS = 20  # in an epoch
GROUPS = "HVDTRAIN_HELD_GROUPS"  # the files that a process id is written to, by rank


class Noise(Dataset[Any]):
    """The same rows again and again."""

    def __init__(self, count: int) -> None:
        made = torch.Generator().manual_seed(0)
        self.count, self.inputs = count, torch.randn(ROWS, WIDTH, generator=made)
        self.targets = torch.randint(10, (ROWS,), generator=made)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.inputs[i % ROWS], self.targets[i % ROWS]


@dataclass(kw_only=True)
class Held(Recipe):
    """A perceptron on noise; 7 MB of gradients."""

    epochs: int = 1
    batch_size: int = 3072
    lr: float = 0.001

    def model(self) -> nn.Module:
        if groups := os.environ.get(GROUPS):
            Path(groups.split(":")[int(os.environ["HOROVOD_RANK"])]).write_text(str(os.getpid()))
        layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 10))

    def dataset(self, split: str) -> Any:
        return Noise(self.batch_size * STEPS if split == "train" else 64)

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        inputs, targets = batch
        outputs = model(inputs)
        return {
            "loss": nn.functional.cross_entropy(outputs, targets, reduction="none"),
            "accuracy": (outputs.argmax(1) == targets).float(),
        }
