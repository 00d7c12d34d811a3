"""What a recipe's data may rely on: seeds, processes, memory, messages; on one rank and on several."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from hvdtrain.system.errors import UserError
from tests.ranks.harness import HVDTRAIN, ROOT, rows, run
from tests.support.limits import stretch
from tests.support.worlds import KeptWorld, train, train_here

DRAWING = str(Path(__file__).parent / "drawing_recipe.py")
HEAD = """
from dataclasses import dataclass
import torch
from torch import nn
from hvdtrain.torch import Recipe

class Listed:
    def __init__(self, count, example):
        self.count, self.example = count, example

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        return self.example(i)

@dataclass(kw_only=True)
class Base(Recipe):
    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.05

    def model(self):
        return nn.Linear(4, 1)

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        x, y = batch
        return {"loss": (model(x)[:, 0] - y) ** 2}

"""


def write_recipe(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(HEAD + "@dataclass(kw_only=True)\nclass Mine(Base):\n    'A recipe.'\n" + body)
    return str(path)


def drawn_splits(seed: int) -> dict[str, Any]:
    """What a rank's datasets are: the examples of each split, as texts of their numbers."""
    import hvdtrain
    from hvdtrain.recipe.registry import load_recipe
    from hvdtrain.torch.setup import load_datasets

    loaded = load_datasets(load_recipe(DRAWING)(), hvdtrain.init(), seed)
    return {split: [str(data.examples[i][0].tolist()) for i in range(len(data))] for split, data in loaded.items()}


def test_splits_that_dataset_draws_are_one_division_on_all_ranks(world2: KeptWorld) -> None:
    one, other = world2.run(drawn_splits, 7)
    assert one == other
    assert len({*one["train"], *one["eval"]}) == 43
    assert world2.run(drawn_splits, 7)[1] == one
    assert world2.run(drawn_splits, 8)[0] != one


def test_draws_depend_on_the_seed_only(tmp_path: Path, world1: KeptWorld, world2: KeptWorld) -> None:
    """Not on the number of loader processes or of ranks, or on a resume; of all that a recipe draws."""
    options = ("--seed", "7", "--log-every", "1", "--threads", "1")
    alone = train(world1, DRAWING, tmp_path / "alone", *options, "--epochs", "3")
    for workers in ("1", "2"):
        again = train(world1, DRAWING, tmp_path / workers, *options, "--epochs", "3", "--workers", workers)
        assert (again["train_loss"], again["eval"]) == (alone["train_loss"], alone["eval"])
    assert [row["loss"] for row in rows(tmp_path / "2")] == [row["loss"] for row in rows(tmp_path / "alone")]
    train(world1, DRAWING, tmp_path / "two", *options, "--epochs", "2", "--workers", "1")
    resumed = train(world1, DRAWING, tmp_path / "two", "--resume", "--epochs", "3")
    assert (resumed["train_loss"], resumed["eval"]) == (alone["train_loss"], alone["eval"])
    # --diagnose ends a run whose ranks have different weights.
    both = train(world2, DRAWING, tmp_path / "both", *options, "--epochs", "3", "--workers", "1", "--diagnose")
    assert both["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)
    assert both["eval"]["loss"] == pytest.approx(alone["eval"]["loss"], rel=1e-5)


def test_an_evaluation_that_draws_is_the_same_each_time_and_changes_no_training(
    tmp_path: Path, world1: KeptWorld, world3: KeptWorld
) -> None:
    options = ("--deterministic", "--noise", "--log-every", "1", "--lr", "0.02")
    often = train(world1, DRAWING, tmp_path / "often", *options, "--eval-every", "1")
    seldom = train(world1, DRAWING, tmp_path / "seldom", *options, "--eval-every", "1000", "--workers", "1")
    assert (often["train_loss"], often["eval"]) == (seldom["train_loss"], seldom["eval"])
    # Deterministic runs evaluate in the same passes on any number of ranks; their sums are added in another order.
    several = train(world3, DRAWING, tmp_path / "several", *options, "--eval-every", "1")
    assert several["eval"]["loss"] == pytest.approx(often["eval"]["loss"], rel=1e-12)


def train_and_count(run_dir: Path, pids: Path) -> tuple[int, list[int]]:
    """This process's id, and its children after training with two loader processes."""
    train_here(DRAWING, run_dir, ("--workers", "2", "--pids", str(pids), "--epochs", "4"))
    process = psutil.Process()
    return process.pid, [child.pid for child in process.children()]


def test_loader_processes_live_as_long_as_the_run(tmp_path: Path, world1: KeptWorld) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    ((rank, children),) = world1.run(train_and_count, tmp_path / "run", pids)
    # Two for each split, and the rank itself, which tries the recipe out.
    assert len({int(path.name) for path in pids.iterdir()} - {rank}) == 4
    assert children == []


def test_a_recipe_without_evaluation(tmp_path: Path, world2: KeptWorld) -> None:
    recipe = write_recipe(
        tmp_path,
        "    best = ('accuracy', 'max')\n"
        "    def dataset(self, split):\n"
        "        return None if split == 'eval' else Listed(40, lambda i: (torch.ones(4), torch.ones(())))\n",
    )
    summary = train(world2, recipe, tmp_path / "run", "--log-every", "1", "--eval-every", "2", "--workers", "1")
    assert summary["eval"] == {}
    assert summary["finished"]
    assert not any(name.startswith("eval_") for row in rows(tmp_path / "run") for name in row)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-10", "step-5"]
    assert "evaluated" not in world2.printed[0]
    assert train(world2, recipe, tmp_path / "run", "--resume", "--epochs", "3")["eval"] == {}


def test_a_recipe_that_collates(tmp_path: Path, world1: KeptWorld, world2: KeptWorld) -> None:
    recipe = write_recipe(
        tmp_path,
        "    def dataset(self, split):\n"
        "        return Listed(40, lambda i: (torch.full((1 + i % 5, 4), i / 40), torch.tensor(i / 40)))\n"
        "    def collate(self, examples):\n"
        "        x = nn.utils.rnn.pad_sequence([x for x, _ in examples], batch_first=True)\n"
        "        return x, torch.stack([y for _, y in examples])\n"
        "    def score(self, model, batch):\n"
        "        return super().score(model, (batch[0].sum(1), batch[1]))\n",
    )
    alone = train(world1, recipe, tmp_path / "alone")
    both = train(world2, recipe, tmp_path / "both", "--workers", "1")
    assert both["eval"]["loss"] == pytest.approx(alone["eval"]["loss"], rel=1e-5)


def test_bad_data_is_refused_alike_on_all_ranks(tmp_path: Path, world2: KeptWorld) -> None:
    bodies = {
        "Mine.dataset('train')[7] is None; expected an example": "Listed(40, lambda i: None if i == 7 else (1.0, 1.0))",
        "Mine.dataset('train') returned None; expected a map-style dataset, with len() and [i]: ...": "None",
        "Mine.dataset('train') is empty; expected one example at least": "[]",
    }
    for number, (error, data) in enumerate(bodies.items()):
        recipe = write_recipe(tmp_path, f"    def dataset(self, split):\n        return {data}\n")
        found = world2.errors(train_here, recipe, tmp_path / f"run-{number}", ())
        assert all(isinstance(one, UserError) and error.removesuffix(" ...") in str(one) for one in found)
        assert str(found[0]) == str(found[1])
    # An evaluation on one rank only is a difference, not a wait for ever.
    recipe = write_recipe(
        tmp_path,
        "    def dataset(self, split):\n"
        "        import horovod.torch as hvd\n"
        "        pairs = Listed(40, lambda i: (torch.ones(4), torch.ones(())))\n"
        "        return None if split == 'eval' and hvd.rank() else pairs\n",
    )
    found = world2.errors(train_here, recipe, tmp_path / "run-one", ())
    assert all("'eval' dataset has 0 examples on rank 1 and 40 on rank 0" in str(one) for one in found)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_example_that_is_none_in_mid_run_is_named_with_rank_and_host(workers: str, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "    def dataset(self, split):\n"
        "        pair = (torch.ones(4), torch.ones(()))\n"
        "        return Listed(40, lambda i: None if split == 'train' and i == 17 else pair)\n",
    )
    command = [*HVDTRAIN, "launch", "-np", "2", recipe, "--run-dir", str(tmp_path / "run"), "--workers", workers]
    done = run("alone", 1, command)
    assert done.returncode == 1
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "[17]" in line]
    assert line.startswith("hvdtrain: error: rank ")
    assert line.endswith(": Mine.dataset('train')[17] is None; expected an example")
    assert "hvdtrain/torch/" not in done.stdout + done.stderr


def test_a_checkpoint_in_mid_epoch_of_an_older_order_is_refused_and_one_between_epochs_resumed(
    tmp_path: Path, world1: KeptWorld
) -> None:
    train(world1, DRAWING, tmp_path / "run", "--steps", "6", "--checkpoint-every", "2")
    for step in (4, 6):
        path = tmp_path / "run" / "checkpoints" / f"step-{step}" / "meta.json"
        meta = json.loads(path.read_text())
        del meta["position"]["order_version"], meta["position"]["rows"]
        state = meta["files"]["state"]
        old = {"format": "hvdtrain checkpoint 1", "recipe": meta["recipe"], "position": meta["position"]}
        path.write_text(json.dumps({**old, "state_bytes": state["bytes"], "state_sha256": state["sha256"]}))
    (error,) = world1.errors(train_here, DRAWING, tmp_path / "run", ("--resume", "--steps", "8"))
    assert str(error) == (
        "cannot resume at example 16 of an epoch that another version of hvdtrain has shuffled differently; resume "
        "from a checkpoint at the end of an epoch, or with that version"
    )
    (tmp_path / "run" / "checkpoints" / "step-6").rename(tmp_path / "step-6")
    assert train(world1, DRAWING, tmp_path / "run", "--resume", "--steps", "8")["steps"] == 8


LAZY = """
import resource, sys
import torch
from torch import nn
import hvdtrain
from tests.ranks.lazy_recipe import Lazy

options = {"run_dir": sys.argv[2], "steps": 10, "quiet": True, "workers": int(sys.argv[3])}
summary = hvdtrain.fit(Lazy(examples=int(sys.argv[1])), **options)
assert summary["samples_seen"] == 640
used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print("KiB", used)
"""


def peak_mib(examples: int, run_dir: Path, workers: int) -> float:
    command = [sys.executable, "-c", LAZY, str(examples), str(run_dir), str(workers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=stretch(100), check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("KiB")[1]) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_examples(tmp_path: Path) -> None:
    few = peak_mib(64, tmp_path / "few", 0)
    # A list of a billion ids is 8 GB, and a bit for each 120 MiB.
    assert peak_mib(10**9, tmp_path / "many", 0) < few + 40
    assert peak_mib(10**9, tmp_path / "workers", 1) < few + 60
    done = run("alone", 1, [*HVDTRAIN, "ledger", "verify", str(tmp_path / "workers")])
    assert done.returncode == 0
    assert done.stdout.startswith("exactly once: 0 epochs x 1000000000 examples and 640 examples of epoch 1")
