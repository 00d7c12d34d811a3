# ruff: noqa: RUF012 as users write it
"""Recipes whose training changes more than the optimizer does: buffers, parameters, modes, learning rates."""

import copy
import random
import threading
import warnings
from dataclasses import dataclass
from typing import ClassVar

import horovod.torch as hvd
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from hvdtrain.torch import Recipe, option

SCORED = 0  # calls of Counted.score


@dataclass(kw_only=True)
class Base(Recipe):
    """40 examples of 4 numbers, with their sum to be learned."""

    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.05
    examples: int = option(40, "examples")

    def model(self):
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def dataset(self, split):
        x = torch.randn(self.examples, 4, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, x.sum(1))

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        x, y = batch
        return {"loss": (model(x)[:, 0] - y) ** 2}


class Stateful(nn.Module):
    """Counts, keeps the newest examples, and a histogram; only while it trains."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 1)
        self.register_buffer("seen", torch.tensor(2**53 + 1))
        self.register_buffer("small", torch.zeros((), dtype=torch.uint8))
        self.register_buffer("total", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("queue", torch.zeros(64, 4))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))
        self.register_buffer("full", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            n = len(x)
            self.seen += n
            self.small += n
            self.total += x.detach().double().sum(0)
            self.phase += torch.complex(x.detach().sum(), -x.detach().sum())
            self.queue[(torch.arange(n) + int(self.at)) % 64] = x.detach()
            self.at.copy_((self.at + n) % 64)
            self.full.fill_(True)
            self.mean.mul_(0.9).add_(0.1 * x.detach().double().mean(0))
        return self.f(x)


@dataclass(kw_only=True)
class Undeclared(Base):
    epochs: int = 1

    def model(self):
        return Stateful()


@dataclass(kw_only=True)
class Declared(Undeclared):
    buffers = {
        "seen": "sum",
        "small": "sum",
        "total": "sum",
        "phase": "sum",
        "mean": "mean",
        "[aqf]*": "rank0",
    }


@dataclass(kw_only=True)
class Misspelled(Undeclared):
    buffers = {"qeue": "rank0"}


@dataclass(kw_only=True)
class WrongMode(Undeclared):
    buffers = {"queue": "average"}


@dataclass(kw_only=True)
class BoolSum(Undeclared):
    buffers: ClassVar[dict[str, str]] = {"full": "sum"}


@dataclass(kw_only=True)
class SparseSum(Base):
    buffers = {"adjacency": "sum"}

    def model(self):
        return Graph()


@dataclass(kw_only=True)
class Local(Undeclared):
    buffers = {"*": "local"}


class Observer(nn.Module):
    """Begins to change its buffer in a later step, in a way that is chosen."""

    def __init__(self, how):
        super().__init__()
        self.f, self.how, self.n = nn.Linear(4, 1), how, 0
        self.register_buffer("scale", torch.ones(4))

    def observe(self, x):
        moved = 0.9 * self.scale.detach() + 0.1 * x.abs().amax(0).detach()
        if self.how == "rebound":
            self.scale = moved
        elif self.how == "registered":
            self.register_buffer("other", moved)
        elif self.how == "data":
            self.scale.data = moved
        elif self.how == "set":
            with torch.no_grad():
                self.scale.set_(moved)
        elif self.how == "silent":
            self.scale.data.copy_(moved)
        elif (self.how == "one rank" and hvd.rank() == 1) or self.how in ("in place", "hook"):
            self.scale.copy_(moved)

    def forward(self, x):
        if self.training:
            self.n += 1
            if self.n > 3 and self.how != "hook":
                self.observe(x)
        out = self.f(x / self.scale)
        if self.training and self.how == "hook":
            out.register_hook(self.observe)  # in backward
        return out


@dataclass(kw_only=True)
class Later(Base):
    how: str = option("in place", "how the buffer is changed")

    def model(self):
        return Observer(self.how)


@dataclass(kw_only=True)
class LaterMean(Later):
    buffers = {"scale": "mean"}


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 1)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())

    def forward(self, x):
        return self.f(torch.sparse.mm(self.adjacency, x.T).T)


class Constants(nn.Module):
    """Buffers that may not be written in place, are not finite, or are shared."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 1)
        self.register_buffer("coo", torch.eye(4).to_sparse())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "in beta state"
            self.register_buffer("csr", torch.eye(4).to_sparse_csr())
        self.register_buffer("ids", torch.arange(4).expand(8, -1))
        self.register_buffer("mask", torch.ones(1).expand(4))
        self.register_buffer("freqs", torch.polar(torch.ones(2), torch.arange(2.0)))
        self.register_buffer("infinite", torch.full((4, 4), float("-inf")).triu(1))
        self.register_buffer("nan", torch.full((2,), float("nan")))
        self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("flag", torch.ones((), dtype=torch.bool))
        whole = torch.arange(6.0)
        self.register_buffer("first", whole[:4])
        self.register_buffer("second", whole[2:])
        self.register_buffer("tied", self.first)
        self.frozen = nn.Parameter(torch.full((4, 4), float("-inf")).triu(1), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(1).expand(4), requires_grad=False)
        self.scale, self.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(0, 4))

    def forward(self, x):
        x = torch.sparse.mm(self.coo, x.T).T * self.mask * self.wide + self.first - self.tied
        return self.f(x @ self.frozen.softmax(1)) * self.scale + self.none.sum()


@dataclass(kw_only=True)
class Constant(Base):
    def model(self):
        return Constants()


class ActNorm(nn.Module):
    """Glow's: scale and bias from the first batch, then learned."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.log_scale, self.bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x):
        if self.training and not self.ready:
            with torch.no_grad():
                if self.how == "data":
                    self.bias.data.copy_(-x.mean(0))
                elif self.how == "memory":
                    self.bias.data = -x.mean(0)
                else:
                    self.bias.copy_(-x.mean(0))
            self.ready.fill_(True)
        return (x + self.bias) * self.log_scale.exp()


@dataclass(kw_only=True)
class DataInit(Base):
    buffers = {"*.ready": "rank0"}
    how: str = option("data", "how the parameter is changed")

    def model(self):
        return nn.Sequential(ActNorm(self.how), nn.Linear(4, 1))


@dataclass(kw_only=True)
class MaxNorm(Base):
    """An embedding that shortens the rows that a batch uses."""

    def model(self):
        return nn.Sequential(nn.Embedding(40, 4, max_norm=0.5), nn.Linear(4, 1))

    def score(self, model, batch):
        x, y = batch
        return {"loss": (model((x[:, 0] * 10).long() % 40)[:, 0] - y) ** 2}


class Teacher(nn.Module):
    """BYOL's: parameters that follow the student's in each training forward."""

    def __init__(self, silent):
        super().__init__()
        self.silent, self.f = silent, nn.Linear(4, 1)
        self.teacher = copy.deepcopy(self.f).requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for t, p in zip(self.teacher.parameters(), self.f.parameters(), strict=True):
                    (t.data if self.silent else t).mul_(0.9).add_(p, alpha=0.1)
        return self.f(x) + 0.1 * self.teacher(x)


@dataclass(kw_only=True)
class Momentum(Base):
    silent: bool = option(False, "write past the version counter")

    def model(self):
        return Teacher(self.silent)


@dataclass(kw_only=True)
class Clamped(Base):
    def score(self, model, batch):
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)
        return super().score(model, batch)


@dataclass(kw_only=True)
class FrozenNorm(Base):
    """A pretrained body whose batch norm stays as it is."""

    how: str = option("eval", "eval() in model(), or a `train` that keeps it")

    def model(self):
        body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        if self.how == "eval":
            body.requires_grad_(False).eval()
        model = (KeepsFrozen if self.how == "train" else nn.Sequential)(body, nn.Linear(4, 1))
        return model.eval() if self.how == "whole" else model

    def score(self, model, batch):
        if self.how == "score" and torch.is_grad_enabled():
            model[0].eval()
        return super().score(model, batch)


class KeepsFrozen(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[0][1].eval()
        return self


@dataclass(kw_only=True)
class Norm(Base):
    def model(self):
        pairs = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.Flatten())  # several values of an example
        return nn.Sequential(nn.Linear(4, 4), pairs, nn.Linear(4, 1))


@dataclass(kw_only=True)
class SyncNorm(Base):
    def model(self):
        return nn.SyncBatchNorm.convert_sync_batchnorm(Norm.model(self))


@dataclass(kw_only=True)
class Lazy(Base):
    def model(self):
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))


@dataclass(kw_only=True)
class Parametrized(Base):
    def model(self):
        p = nn.utils.parametrizations
        old = nn.utils.spectral_norm(nn.Linear(4, 4))
        return nn.Sequential(p.weight_norm(nn.Linear(4, 4)), p.spectral_norm(nn.Linear(4, 4)), old, nn.Linear(4, 1))


@dataclass(kw_only=True)
class Counted(Base):
    """Counts its calls wherever it can, and draws from all generators; what it counts is its loss's weight."""

    calls: ClassVar[int] = 0
    log: ClassVar[list] = []
    uncopyable: bool = option(False, "hold something that cannot be copied")

    def __post_init__(self):
        self.own, self.trace = 0, []
        self.lock = threading.Lock() if self.uncopyable else None

    def model(self):
        global SCORED
        SCORED = Counted.calls = 0
        Counted.log.clear()
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
        model.calls = 0
        return model

    def score(self, model, batch):
        global SCORED
        SCORED += 1
        Counted.calls += 1
        Counted.log.append(1)
        self.own += 1
        self.trace.append(1)
        model.calls += 1
        counts = [SCORED, Counted.calls, len(Counted.log), self.own, len(self.trace), model.calls]
        drawn = torch.rand(()).item() + np.random.rand() + random.random()
        print(f"counts {counts} {drawn!r}", flush=True)
        return super().score(model, batch)


@dataclass(kw_only=True)
class Scheduled(Base):
    """With a learning-rate scheduler of its own."""

    how: str = option("exponential", "which")

    def optimizer(self, params):
        optimizer = super().optimizer(params)
        if self.how == "exponential":
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        elif self.how == "plateau":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        self.held = optimizer
        return optimizer

    def score(self, model, batch):
        if self.how == "by hand" and torch.is_grad_enabled() and model.training:
            self.held.param_groups[0]["lr"] *= 0.9
        return super().score(model, batch)


class Dicts(Dataset):
    def __init__(self, n):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.x[i].sum()}


@dataclass(kw_only=True)
class Collective(Base):
    """A statistic over all ranks within score."""

    dicts: bool = option(False, "with batches that are dicts")
    epochs: int = 1

    def dataset(self, split):
        return Dicts(self.examples) if self.dicts else super().dataset(split)

    def score(self, model, batch):
        x, y = (batch["x"], batch["y"]) if self.dicts else batch
        out = model(x)[:, 0]
        mean = hvd.allreduce(out.detach().mean(), name="mean")
        return {"loss": (out - y + 0 * mean) ** 2}
