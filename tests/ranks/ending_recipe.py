"""A small regression that ends, hangs, or leaves something running on purpose."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn
from torch.utils.data import Dataset

from hvdtrain.comm.world import rank_from_environment
from hvdtrain.torch import Recipe, option


class Line(Dataset[Any]):
    def __init__(self, recipe: Ending) -> None:
        self.recipe = recipe
        self.inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if self.recipe.steps_begun >= self.recipe.at_step:
            self.recipe.do("item")
        return self.inputs[index], self.inputs[index].sum()


@dataclass(kw_only=True)
class Ending(Recipe):
    """Does `how` in `where`, on a rank of its own."""

    how: str = option("", "exit3, exit-text, exit-none, os-exit0, os-exit5, segv, collective, sleep, thread, child ...")
    where: str = option("score", "model, dataset, item or score")
    on: int = option(-1, "the rank that does it; -1: every rank")
    at_step: int = option(3, "in score and item: not before this step")
    once: str = option("", "a file that is made when it is done, so that it is done once")
    pause: float = option(0.0, "seconds that each score takes longer")
    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.05
    steps_begun = 0

    def model(self) -> nn.Module:
        self.do("model")
        return nn.Linear(4, 1)

    def dataset(self, split: str) -> Line:
        self.do("dataset")
        return Line(self)

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if model.training and torch.is_grad_enabled():
            self.steps_begun += 1
            time.sleep(self.pause)
            if self.steps_begun >= self.at_step:
                self.do("score")
        inputs, targets = batch
        return {"loss": (model(inputs)[:, 0] - targets) ** 2}

    def do(self, where: str) -> None:
        member = os.environ.get("HVDTRAIN_MEMBER", "")
        rank = json.loads(member)["slot"]["local_rank"] if member else rank_from_environment() or 0
        if where != self.where or self.on not in (-1, rank) or (self.once and Path(self.once).exists()):
            return
        if self.once:
            Path(self.once).touch()
        match self.how:
            case "exit3":
                sys.exit(3)
            case "exit-text":
                sys.exit("no licence for this data")
            case "exit-none":
                sys.exit()
            case "os-exit0":
                os._exit(0)
            case "os-exit5":
                os._exit(5)
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "collective":
                hvd.allreduce(torch.ones(1), name="mean of mine")
            case "sleep":
                time.sleep(3600)
            case "thread":
                threading.Thread(target=time.sleep, args=[3600], name="uploads").start()
            case "child":
                multiprocessing.get_context("fork").Process(target=time.sleep, args=[3600]).start()
            case "fork":
                subprocess.Popen(["sleep", "3600"], start_new_session=True)
