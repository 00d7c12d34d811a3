"""Recipes that use what other recipes leave alone, or do it wrong."""

import math
import os
from collections import namedtuple
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from hvdtrain.torch import Recipe, option
from tests.ranks.exact_recipe import EVAL, TRAIN, Exact, Stateful

Pair = namedtuple("Pair", ["inputs", "targets"])


class Pairs(Dataset):
    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return Pair(*(t[i] for t in self.tensors))


@dataclass(kw_only=True)
class Named(Exact):
    """With batches that are namedtuples, and a field that is worked out."""

    double: float = field(init=False, default=0.0)

    def __post_init__(self):
        self.double = 2 * self.lr

    def dataset(self, split):
        return Pairs(TRAIN if split == "train" else EVAL)

    def score(self, model, batch):
        return {"loss": (model(batch.inputs).squeeze(1) - batch.targets).square()}


@dataclass(kw_only=True)
class ConstantNorm(Exact):
    """Batch norm of constant inputs: what its running mean must be is known."""

    batch_size: int = 16

    def model(self):
        return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1)).double()

    def dataset(self, split):
        return TensorDataset(torch.full((48, 5), 3.0, dtype=torch.float64), torch.zeros(48, dtype=torch.float64))


@dataclass(kw_only=True)
class NanInput(ConstantNorm):
    """One example of 48 is not a number."""

    def dataset(self, split):
        inputs = torch.randn(48, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if split == "train":
            inputs[7] = math.nan
        return TensorDataset(inputs, torch.zeros(48, dtype=torch.float64))


@dataclass(kw_only=True)
class Mean(Exact):
    """Returns a mean, but for two examples."""

    def score(self, model, batch):
        loss = super().score(model, batch)["loss"]
        return {"loss": loss if len(loss) == 2 else loss.mean()}


@dataclass(kw_only=True)
class Forgets(Exact):
    """Returns a metric in training only."""

    def score(self, model, batch):
        scores = super().score(model, batch)
        return scores if model.training else {"loss": scores["loss"]}


@dataclass(kw_only=True)
class Embedding(Recipe):
    """An embedding with sparse gradients."""

    sparse_adam: bool = option(True, "SparseAdam, else SGD")
    epochs: int = 2
    batch_size: int = 10
    lr: float = 0.05

    def model(self):
        return nn.Embedding(20, 4, sparse=True, dtype=torch.float64)

    def dataset(self, split):
        words = torch.arange(53) * 7 % 20
        return TensorDataset(words, words % 4)

    def optimizer(self, params):
        cls = torch.optim.SparseAdam if self.sparse_adam else torch.optim.SGD
        return cls(list(params), lr=self.lr)

    def score(self, model, batch):
        words, labels = batch
        return {"loss": F.cross_entropy(model(words), labels, reduction="none")}


@dataclass(kw_only=True)
class WrongBest(Exact):
    """Keeps the best by a metric that it has not."""

    best = ("withing", "max")


class RunningMean(nn.Module):
    """Keeps a running mean by putting a new tensor in the old one's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean()
        return inputs - self.mean


@dataclass(kw_only=True)
class Rebinds(Exact):
    """With a buffer that does not stay the same tensor."""

    def model(self):
        return nn.Sequential(RunningMean(), super().model())


@dataclass(kw_only=True)
class TellsSecret(Stateful):
    """Prints a variable of its environment, in which it finds its data, say."""

    def dataset(self, split):
        if split == "train":
            print(f"secret {os.environ.get('SECRET_OF_TEST')}", flush=True)
        return super().dataset(split)


@dataclass(kw_only=True)
class RankData(Exact):
    """On each rank one example more than on the one before."""

    def dataset(self, split):
        import horovod.torch as hvd

        return torch.utils.data.Subset(super().dataset(split), range(100 + hvd.rank()))


@dataclass(kw_only=True)
class Column(Exact):
    """Names a metric as a column of metrics.jsonl."""

    def score(self, model, batch):
        scores = super().score(model, batch)
        return {"loss": scores["loss"], "lr": scores["within"]}


@dataclass(kw_only=True)
class Scattered(Exact):
    """With an operation that has no deterministic form."""

    def score(self, model, batch):
        torch.zeros(5).put_(torch.tensor([0]), torch.ones(1))
        return super().score(model, batch)
