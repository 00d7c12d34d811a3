"""--deterministic: the same bits on any number of ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.harness import HVDTRAIN, ROOT, run, train

DIGITS = str(ROOT / "recipes" / "digits.py")
VARIED = f"{Path(__file__).parent / 'varied_recipe.py'}:Varied"
NOISY = f"{Path(__file__).parent / 'exact_recipe.py'}:Noisy"
# 1,437 examples in batches of 100: the last has 37.
OPTIONS = ["--epochs", "2", "--deterministic", "--clip-norm", "0.5", "--micro-batch", "4", "--ema", "0.9"]


def digest(run_dir: Path) -> str:
    """Of all tensors and numbers in a run's last checkpoint: model, optimizer, average, loss scale."""
    steps = json.loads((run_dir / "summary.json").read_text())["steps"]
    state = torch.load(run_dir / "checkpoints" / f"step-{steps}" / "state", weights_only=True)
    found = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                found.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)
        elif isinstance(value, torch.Tensor):
            found.update(value.contiguous().numpy().tobytes())
        else:
            found.update(repr(value).encode())

    walk(state)
    return found.hexdigest()


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The model of a run's best checkpoint."""
    state = torch.load(run_dir / "checkpoints" / "best" / "state", weights_only=True)
    model: dict[str, torch.Tensor] = state["model"]
    return model


def trained(kind: str, ranks: int, recipe: str, run_dir: Path, *options: str) -> str:
    summary = train(kind, ranks, recipe, run_dir, *options)
    assert summary["world_size"] == ranks
    return digest(run_dir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained("alone", 1, VARIED, tmp_path_factory.mktemp("alone") / "run", *OPTIONS)


@pytest.mark.parametrize(
    ("kind", "ranks"), [("horovodrun", 2), ("horovodrun", 3), ("horovodrun", 4), ("horovodrun", 5), ("mpirun", 2)]
)
def test_the_same_bits_on_any_number_of_ranks(kind: str, ranks: int, alone: str, tmp_path: Path) -> None:
    assert trained(kind, ranks, VARIED, tmp_path / "run", *OPTIONS) == alone


def test_digits_as_shipped(tmp_path: Path) -> None:
    options = ["--epochs", "3", "--deterministic", "--checkpoint-every", "5"]
    found = {trained(*where, DIGITS, tmp_path / str(where[1]), *options) for where in (("alone", 1), ("horovodrun", 3))}
    assert len(found) == 1


def test_more_ranks_than_shards(tmp_path: Path) -> None:
    """And mixed precision with a loss scale, whose first steps are skipped."""
    options = ["--steps", "8", "--deterministic", "--virtual-shards", "3", "--amp", "fp16", "--clip-norm", "1"]
    found = [
        trained(kind, ranks, DIGITS, tmp_path / str(ranks), *options)
        for kind, ranks in (("alone", 1), ("horovodrun", 2), ("horovodrun", 4))
    ]
    assert found == found[:1] * 3


def test_another_number_of_ranks_in_mid_epoch(alone: str, tmp_path: Path) -> None:
    """2 ranks until step 7 of the first epoch's 15, in its warm-up, which is the same in either's schedule; then 3."""
    folder = tmp_path / "run"
    train("horovodrun", 2, VARIED, folder, *OPTIONS[2:], "--steps", "7")
    resumed = train("horovodrun", 3, VARIED, folder, "--resume", "--epochs", "2")
    assert (resumed["resumed_from"], resumed["world_size"], resumed["steps"]) == (7, 3, 30)
    assert digest(folder) == alone


def test_without_it_the_bits_depend_on_the_ranks(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--threads", "1"]
    train("alone", 1, DIGITS, tmp_path / "one", *options)
    train("horovodrun", 3, DIGITS, tmp_path / "three", *options)
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert any(not torch.equal(value, three[name]) for name, value in one.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_running_statistics_are_refused_by_name(ranks: int, tmp_path: Path) -> None:
    command = [*HVDTRAIN, "train", NOISY, "--run-dir", str(tmp_path / "run"), "--deterministic"]
    done = run("horovodrun" if ranks > 1 else "alone", ranks, command)
    error = (
        "--deterministic: training changes the buffer '1.running_mean' of a BatchNorm1d, which depends on the number "
        "of ranks; use a layer without such buffers, GroupNorm for instance\n"
    )
    assert error in done.stderr
    assert not (tmp_path / "run").exists()
    if ranks == 1:
        assert (done.returncode, done.stderr) == (2, f"hvdtrain: error: {error}")


def test_the_plan_says_so(tmp_path: Path) -> None:
    command = [*HVDTRAIN, "train", DIGITS, "--run-dir", str(tmp_path / "run"), "--steps", "1", "--deterministic"]
    done = run("alone", 1, command)
    assert "batch     128 global = 1 rank x 12 passes x at most 11\n" in done.stdout
    assert "gradient  deterministic 12 virtual shards, compression none, amp off\n" in done.stdout


def test_an_operation_that_has_no_deterministic_form_is_named(tmp_path: Path) -> None:
    recipe = f"{Path(__file__).parent / 'odd_recipes.py'}:Scattered"
    done = run("alone", 1, [*HVDTRAIN, "train", recipe, "--run-dir", str(tmp_path / "run"), "--deterministic"])
    assert done.returncode == 1
    assert done.stderr.startswith("hvdtrain: error: put_ has no deterministic form in torch on this device")
    assert done.stderr.count("\n") == 1
