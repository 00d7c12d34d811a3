"""A mistake in a recipe on one rank or on all: one line on every rank, and the recipe's traceback once."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from hvdtrain.system.errors import RecipeError, UserError
from tests.ranks.harness import HVDTRAIN, Job, launcher, run
from tests.support.worlds import KeptWorld, train_here

HERE = socket.gethostname()
RECIPE = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
from hvdtrain.torch import Recipe
import horovod.torch as hvd

@dataclass(kw_only=True)
class Mine(Recipe):
    where: str = ""
    rank: int = -1  # on which it fails, -1: on all
    epochs: int = 1

    def fail(self, where):
        if where == self.where and self.rank in (-1, hvd.rank()):
            raise ValueError(f"no {where}")

    def model(self):
        self.fail("model")
        return nn.Linear(2, 1)

    def dataset(self, split):
        self.fail(split)
        x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, x.sum(1))

    def optimizer(self, params):
        self.fail("optimizer")
        return None if self.where == "none" else torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        x, y = batch
        self.fail("score")
        if torch.is_grad_enabled():
            self.fail("training")
        return {"loss": (model(x)[:, 0] - y) ** 2}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("where", "call"),
    [("model", "model()"), ("train", "dataset('train')"), ("eval", "dataset('eval')"), ("optimizer", "optimizer()")],
)
def test_all_ranks_raise_what_one_rank_raised(world2: KeptWorld, mine: Path, where: str, call: str) -> None:
    options = ("--where", where, "--rank", "1")
    errors = world2.errors(train_here, str(mine), mine.parent / "run", options)
    expected = f"rank 1 on {HERE}: Mine.{call} raised ValueError: no {where}"
    assert [(type(error), str(error), error.origin) for error in errors] == [(RecipeError, expected, 1)] * 2
    assert all('raise ValueError(f"no {where}")' in error.trace for error in errors if isinstance(error, RecipeError))


def test_all_ranks_raise_the_same_error_without_a_rank(world2: KeptWorld, mine: Path) -> None:
    errors = world2.errors(train_here, str(mine), mine.parent / "run", ("--where", "model"))
    assert [str(error) for error in errors] == ["Mine.model() raised ValueError: no model"] * 2
    errors = world2.errors(train_here, str(mine), mine.parent / "run", ("--where", "none"))
    expected = "Mine.optimizer() returned NoneType; expected a torch.optim.Optimizer: does it lack a return?"
    assert [(type(error), str(error)) for error in errors] == [(UserError, expected)] * 2


def test_one_process_prints_its_traceback_and_one_line(mine: Path) -> None:
    done = run(
        "alone", 1, [*HVDTRAIN, "train", str(mine), "--run-dir", str(mine.parent / "run"), "--where", "training"]
    )
    assert done.returncode == 1
    *trace, error, last = done.stderr.splitlines()
    assert last == "hvdtrain: error: Mine.score() raised ValueError: no training"
    assert error == "ValueError: no training"
    assert [line for line in trace if line.startswith("  File ") and str(mine) not in line] == []


def test_launch_prints_the_traceback_of_a_rank_once(mine: Path) -> None:
    train = [str(mine), "--run-dir", str(mine.parent / "run"), "--where", "model", "--rank", "1"]
    done = run("alone", 1, [*HVDTRAIN, "launch", "-np", "2", *train])
    assert done.returncode == 1
    shown = done.stdout + done.stderr
    expected = f"hvdtrain: error: rank 1 on {HERE}: Mine.model() raised ValueError: no model\nTraceback (most recent"
    assert expected in shown, shown
    assert shown.count("Traceback (most recent call last):") == 1, shown
    assert "site-packages" not in shown, shown


def test_bare_ranks_print_the_traceback_once(mine: Path) -> None:
    train = ["train", str(mine), "--run-dir", str(mine.parent / "run"), "--where", "train", "--rank", "1"]
    with Job([*launcher("mpirun", 2), sys.executable, "-m", "hvdtrain", *train]) as job:
        done = job.finish()
    line = f"hvdtrain: error: rank 1 on {HERE}: Mine.dataset('train') raised ValueError: no train"
    assert done.returncode == 1 and line in done.stderr, done.stderr
    assert done.stderr.count("Traceback (most recent call last):") == 1, done.stderr
