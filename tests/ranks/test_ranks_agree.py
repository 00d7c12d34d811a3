"""Ranks that differ are refused before step 1, on all ranks, with the first difference named."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.system.errors import KnownError, UserError
from tests.ranks.harness import HVDTRAIN, Job, launcher
from tests.support.worlds import KeptWorld, train_here

HERE = socket.gethostname()
RECIPE = """
import random
from dataclasses import dataclass
import horovod.torch as hvd
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from hvdtrain.torch import Recipe

RANK = hvd.rank() if hvd.is_initialized() else 0

class Examples:
    def __init__(self, recipe, n): self.recipe, self.n = recipe, n
    def __len__(self): return self.n
    def __getitem__(self, i):
        kind, x = self.recipe.kind, float(i)
        if kind == "augmented": x += np.random.rand() + random.random() + float(torch.rand(()))
        if kind == "unseeded": x += np.random.default_rng().random()
        if kind == "last example" and i == self.n - 1: x += hvd.rank()
        if kind == "middle example" and i == self.n // 2: x += hvd.rank()
        if kind == "object": return {"x": torch.tensor([x] * 4), "path": f"file{hvd.rank()}" if i == 0 else "file"}
        return torch.tensor([x] * 4), x

@dataclass(kw_only=True)
class Mine(Recipe):
    kind: str = ""
    epochs: int = 1
    batch_size: int = 8

    def model(self):
        odd = hvd.rank() == 1
        names = ["a", "b", "c"]
        if self.kind == "order of parameters" and odd: names.reverse()
        net = nn.ModuleDict({name: nn.Linear(4, 1) for name in names})
        if self.kind == "size" and odd: net["b"] = nn.Linear(4, 2)
        if self.kind == "dtype" and odd: net["b"].double()
        if self.kind == "frozen" and odd: net["c"].bias.requires_grad_(False)
        if self.kind == "more" and odd: net["d"] = nn.Linear(4, 1)
        if self.kind == "buffer": net.register_buffer("table", torch.zeros(2 + odd))
        return net

    def dataset(self, split):
        if self.kind == "no evaluation" and hvd.rank() == 1 and split == "eval": return None
        n = 41 if split == "eval" else 40
        return Examples(self, n + (self.kind == "length" and hvd.rank() == 1))

    def optimizer(self, params):
        lr = self.lr * (2 if self.kind == "lr" and hvd.rank() == 1 else 1)
        return torch.optim.SGD(params, lr=lr, momentum=0.5)

    def score(self, model, batch):
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        loss = sum(model[k](x)[:, 0] for k in "abc") ** 2 * 1e-6
        return {"loss": loss, "other" if self.kind == "metrics" and hvd.rank() == 1 else "size": loss.detach()}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    return path


def train_apart(recipes: tuple[str, ...], run_dir: Path, options: tuple[tuple[str, ...], ...]) -> Any:
    """Train with other arguments on each rank."""
    import horovod.torch as hvd

    import hvdtrain

    rank = hvdtrain.init().rank
    assert hvd.size() == len(options)
    return train_here(recipes[rank], run_dir, options[rank])


def refusal(errors: list[KnownError]) -> str:
    """The message, which is the same UserError on all ranks."""
    assert {type(error) for error in errors} == {UserError}, errors
    assert len({str(error) for error in errors}) == 1, errors
    return str(errors[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "order of parameters",
            "{who}: parameter 1 is 'c.weight' (1, 4) float32, rank 0 has 'a.weight' (1, 4) float32",
        ),
        ("size", "{who}: parameter 3 is 'b.weight' (2, 4) float32, rank 0 has 'b.weight' (1, 4) float32"),
        ("dtype", "{who}: parameter 3 is 'b.weight' (1, 4) float64, rank 0 has 'b.weight' (1, 4) float32"),
        ("frozen", "{who}: parameter 6 is 'c.bias' (1,) float32, frozen, rank 0 has 'c.bias' (1,) float32"),
        ("more", "{who}: parameter 7 is 'd.weight' (1, 4) float32, rank 0 has none"),
        ("buffer", "{who}: buffer 1 is 'table' (3,) float32, rank 0 has 'table' (2,) float32"),
        ("lr", "{who}: lr of the optimizer's group 1 is 0.2, rank 0 has 0.1"),
        ("metrics", "{who}: scores are loss, other, rank 0 has loss, size"),
        (
            "length",
            "the recipe's 'train' dataset has 41 examples on rank 1 and 40 on rank 0: all ranks need the same "
            "data ({who})",
        ),
        (
            "no evaluation",
            "the recipe's 'eval' dataset has 0 examples on rank 1 and 41 on rank 0: all ranks need the same "
            "data ({who})",
        ),
        ("last example", "{who}: dataset('train')[39] differs from rank 0's (file order? sort the list of files)"),
        ("middle example", "{who}: dataset('train')[20] differs from rank 0's (file order? sort the list of files)"),
        ("object", "{who}: dataset('train')[0] differs from rank 0's (file order? sort the list of files)"),
    ],
)
def test_what_a_recipe_makes_otherwise_on_a_rank_is_named(
    world2: KeptWorld, mine: Path, kind: str, message: str
) -> None:
    errors = world2.errors(train_here, str(mine), mine.parent / "run", ("--kind", kind))
    assert refusal(errors) == message.format(who=f"rank 1 on {HERE}")
    assert not (mine.parent / "run").exists()


@pytest.mark.parametrize("kind", ["", "augmented", "unseeded"])
def test_what_is_alike_or_random_trains(world2: KeptWorld, mine: Path, kind: str) -> None:
    summaries = world2.run(train_here, str(mine), mine.parent / "run", ("--kind", kind, "--quiet"))
    assert [summary["steps"] for summary in summaries] == [5, 5]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (("--batch-size", "8"), ("--batch-size", "16"), "--batch-size is 16 on {who}, 8 on rank 0"),
        (("--seed", "1"), (), "--seed is 0 on {who}, 1 on rank 0"),
        ((), ("--epochs", "3"), "--epochs is 3 on {who}, 1 on rank 0"),
        (("--epochs", "1"), ("--steps", "5"), "--steps is 5 on {who}, None on rank 0"),
        (("--kind", "y"), ("--kind", "x"), "--kind is x on {who}, y on rank 0"),
        ((), ("--resume",), "--resume is True on {who}, False on rank 0"),
        (("--resume", "--lr", "1"), ("--resume",), "--lr is not given on {who}, 1.0 on rank 0"),
        (
            ("--deterministic", "--threads", "1"),
            ("--deterministic", "--threads", "2"),
            "--threads is 2 on {who}, 1 on rank 0",
        ),
    ],
)
def test_other_options_on_a_rank_are_named(
    world2: KeptWorld, mine: Path, ours: tuple[str, ...], theirs: tuple[str, ...], message: str
) -> None:
    errors = world2.errors(train_apart, (str(mine), str(mine)), mine.parent / "run", (ours, theirs))
    assert refusal(errors) == message.format(who=f"rank 1 on {HERE}")
    assert not (mine.parent / "run").exists()


def test_what_a_rank_may_choose_for_itself_trains(world2: KeptWorld, mine: Path) -> None:
    other = ("--threads", "1", "--quiet", "--device", "cpu")
    summaries = world2.run(train_apart, (str(mine), str(mine)), mine.parent / "run", ((), other))
    assert [summary["steps"] for summary in summaries] == [5, 5]


def test_another_recipe_or_file_on_a_rank_is_named(world2: KeptWorld, mine: Path) -> None:
    second = mine.parent / "b" / "mine.py"
    second.parent.mkdir()
    second.write_text(RECIPE.replace("momentum=0.5", "momentum=0.6"))
    run = mine.parent / "run"
    errors = world2.errors(train_apart, (str(mine), str(second)), run, ((), ()))
    assert refusal(errors) == (
        f"rank 1 on {HERE}: the recipe's file mine.py differs from rank 0's: all ranks need the same"
    )
    errors = world2.errors(train_apart, (str(mine), "digits"), run, ((), ()))
    assert refusal(errors) == f"RECIPE is digits on rank 1 on {HERE}, mine on rank 0"
    (mine.parent / "sizes.py").write_text("N = 1")
    (second.parent / "sizes.py").write_text("N = 2")
    for path in (mine, second):
        path.write_text("import sizes\n" + RECIPE)
    errors = world2.errors(train_apart, (str(mine), str(second)), run, ((), ()))
    assert refusal(errors) == (
        f"rank 1 on {HERE}: the recipe's file sizes.py differs from rank 0's: all ranks need the same"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((["--batch-size", "8"], ["--batch-size", "16"]), "--batch-size is 16 on rank 1 on {host}, 8 on rank 0"),
        ((["--seed", "0"], ["--seed", "1"]), "--seed is 1 on rank 1 on {host}, 0 on rank 0"),
    ],
)
def test_bare_mpirun_with_other_options_ends_with_2(
    mine: Path, options: tuple[list[str], list[str]], message: str
) -> None:
    train = [sys.executable, "-m", "hvdtrain", "train", str(mine), "--run-dir", str(mine.parent / "run")]
    line = launcher("mpirun", 1)
    with Job([*line, *train, *options[0], ":", *line[-2:], *train, *options[1]]) as job:
        done = job.finish(60)
    assert done.returncode == 2, done.stderr
    assert f"hvdtrain: error: {message.format(host=HERE)}\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_horovodrun_refuses_parameters_out_of_a_set(mine: Path) -> None:
    text = RECIPE.replace('names = ["a", "b", "c"]', 'names = list({"a", "b", "c", "d", "e", "f", "g", "h"})')
    mine.write_text(text)
    train = [*HVDTRAIN, "train", str(mine), "--run-dir", str(mine.parent / "run")]
    with Job([*launcher("horovodrun", 2), *train]) as job:
        done = job.finish(60)
    assert done.returncode != 0
    assert f"hvdtrain: error: rank 1 on {HERE}: parameter " in done.stdout + done.stderr


def broadcast_models_in_another_order() -> None:
    import torch

    import hvdtrain
    from hvdtrain.torch import broadcast_state

    rank = hvdtrain.init().rank
    broadcast_state(torch.nn.ModuleDict({k: torch.nn.Linear(4, 1) for k in ("ba" if rank else "ab")}))


def test_broadcast_state_refuses_parameters_in_another_order(world2: KeptWorld) -> None:
    errors = world2.errors(broadcast_models_in_another_order)
    assert refusal(errors) == (
        f"rank 1 on {HERE}: parameter 1 is 'b.weight' (1, 4) float32, rank 0 has 'a.weight' (1, 4) float32"
    )


def seconds_to_agree(run_dir: Path) -> float:
    """What the comparisons of one start take, without loading examples: for a model of 148 tensors."""
    import torch

    import hvdtrain
    from hvdtrain.comm import collectives
    from hvdtrain.comm.agreement import check_agreement
    from hvdtrain.torch.consistency import model_parts

    hvdtrain.init()
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(74)))
    times = []
    for _ in range(10):
        collectives.barrier("agree.barrier")
        begin = time.perf_counter()
        check_agreement("agree.timed", model_parts(model))
        times.append(time.perf_counter() - begin)
    (run_dir / "times.json").write_text(json.dumps(times))
    return sorted(times)[len(times) // 2]


def test_agreement_is_one_small_collective(world2: KeptWorld, tmp_path: Path) -> None:
    seconds = world2.run(seconds_to_agree, tmp_path)
    print(f"agreement over 148 tensors: {max(seconds) * 1000:.1f} ms")
    assert max(seconds) < 2  # a bound on hanging, not on speed
