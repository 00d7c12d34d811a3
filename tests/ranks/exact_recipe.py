"""Recipes for tests: least squares in float64, and one with dropout and batch norm."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hvdtrain.torch import Recipe, option


def _made(count, seed):
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=made, dtype=torch.float64)
    slope = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return inputs, inputs @ slope + 0.1 * torch.randn(count, generator=made, dtype=torch.float64)


TRAIN, EVAL = _made(1003, 0), _made(251, 1)


@dataclass(kw_only=True)
class Exact(Recipe):
    """Least squares in float64."""

    epochs: int = 2
    batch_size: int = 7
    lr: float = 0.003

    def initial(self):
        return torch.linspace(0.5, -0.5, 5, dtype=torch.float64)

    def model(self):
        model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(self.initial()[None])
        return model

    def dataset(self, split):
        return TensorDataset(*(TRAIN if split == "train" else EVAL))

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def score(self, model, batch):
        inputs, targets = batch
        errors = model(inputs).squeeze(1) - targets
        return {"loss": errors.square(), "within": (errors.abs() < 0.1).float()}


class SaveAtExit(nn.Sequential):
    """Writes the state of every rank when an evaluation begins."""

    def eval(self):
        if folder := os.environ.get("HVDTRAIN_TEST_OUT"):
            import horovod.torch as hvd

            torch.save(self.state_dict(), Path(folder) / f"rank{hvd.rank()}.pt")
        return super().eval()


@dataclass(kw_only=True)
class Noisy(Exact):
    """With dropout and batch norm."""

    # On three ranks the last batch of 1,003 leaves 1 example per rank and none for the last: batch norm needs 2.
    batch_size: int = 9

    def model(self):
        layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        return SaveAtExit(*layers).double()

    def dataset(self, split):
        inputs, targets = TRAIN if split == "train" else EVAL
        return TensorDataset(inputs[:999], targets[:999])


@dataclass(kw_only=True)
class Stateful(Noisy):
    """With everything that has a state; a step lasts as long as HVDTRAIN_TEST_STEP_SECONDS says."""

    width: int = option(8, "units of the hidden layer")
    decay: float = option(0.01, "weight decay")
    fewer: int = option(0, "training examples that are missing")
    batch_size: int = 30

    def model(self):
        layers = (nn.Linear(5, self.width), nn.BatchNorm1d(self.width), nn.Dropout(0.3), nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(self.width, 1)).double()

    def optimizer(self, params):
        return torch.optim.AdamW(params, lr=self.lr, weight_decay=self.decay)

    def dataset(self, split):
        whole = super().dataset(split)
        return whole if split == "eval" else torch.utils.data.Subset(whole, range(len(whole) - self.fewer))

    def score(self, model, batch):
        time.sleep(float(os.environ.get("HVDTRAIN_TEST_STEP_SECONDS", "0")))
        return super().score(model, batch)


@dataclass(kw_only=True)
class Overflow(Exact):
    """In float32; HVDTRAIN_TEST_OVERFLOW_STEP and HVDTRAIN_TEST_NAN=rank:step spoil one rank's step."""

    def model(self):
        return super().model().float()

    def score(self, model, batch):
        import horovod.torch as hvd

        inputs, targets = batch
        scores = super().score(model, (inputs.float(), targets.float()))
        if model.training and torch.is_grad_enabled():
            self.count = getattr(self, "count", -1) + 1
            last = hvd.rank() == hvd.size() - 1
            if last and str(self.count) == os.environ.get("HVDTRAIN_TEST_OVERFLOW_STEP"):
                scores["loss"].register_hook(lambda gradient: gradient * float("inf"))
            if f"{hvd.rank()}:{self.count}" == os.environ.get("HVDTRAIN_TEST_NAN"):
                scores["loss"] = scores["loss"] * float("nan")
        return scores


@dataclass(kw_only=True)
class TellThreads(Exact):
    """Prints the number of threads that torch uses."""

    def dataset(self, split):
        if split == "eval":
            print(f"threads {torch.get_num_threads()}.", flush=True)
        return super().dataset(split)
