"""A recipe that draws random numbers wherever it can, from each of the global generators."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset, random_split

from hvdtrain.torch import Recipe, option


class Noisy:
    """Examples with noise of all three generators."""

    def __init__(self, examples, pids):
        self.examples, self.pids = examples, pids

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        if self.pids is not None:
            (self.pids / str(os.getpid())).touch()
        x, y = self.examples[i]
        return x + torch.randn(4), y + random.gauss(0, 1) + np.random.normal()


class Langevin(torch.optim.SGD):
    """Gradient steps with noise."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=1e-3 * (1 + random.random() + np.random.rand()))


@dataclass(kw_only=True)
class DrawingRecipe(Recipe):
    """A small linear regression."""

    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.01
    noise: bool = option(False, "evaluate with noise")
    pids: Path | None = option(None, "folder in which each process that loads an example makes a file")

    def model(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        with torch.no_grad():
            net[0].weight.mul_(float(np.random.rand()) + random.random())
        return net

    def dataset(self, split):
        x = torch.randn(43, 4)
        order = list(range(43))
        random.shuffle(order)
        np.random.shuffle(order)
        data = TensorDataset(x[order], x[order].sum(1))
        train, held_out = random_split(data, [32, 11])
        return Noisy(train if split == "train" else held_out, self.pids)

    def optimizer(self, params):
        return Langevin(params, lr=self.lr * random.uniform(0.5, 1) * float(torch.rand(()) + 0.5))

    def score(self, model, batch):
        x, y = batch
        if self.noise and not model.training:
            x = x + torch.randn_like(x) + random.random()
        return {"loss": (model(x.float())[:, 0] - y.float()) ** 2}
