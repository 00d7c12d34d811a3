"""--deterministic: the same bits on any number of ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import harness
from tests.ranks.harness import ROOT
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

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


def trained(world: KeptWorld, recipe: str, run_dir: Path, *options: str) -> str:
    summary = train(world, recipe, run_dir, *options)
    assert summary["world_size"] == world.size
    return digest(run_dir)


@pytest.fixture(scope="module")
def alone(world1: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(world1, VARIED, tmp_path_factory.mktemp("alone") / "run", *OPTIONS)


@pytest.mark.parametrize("ranks", [3, *slow(2, 4)])
def test_the_same_bits_on_any_number_of_ranks(ranks: int, worlds: KeptWorlds, alone: str, tmp_path: Path) -> None:
    assert trained(worlds[ranks], VARIED, tmp_path / "run", *OPTIONS) == alone


@pytest.mark.slow
def test_the_same_bits_on_five_ranks(alone: str, tmp_path: Path) -> None:
    with KeptWorld(5) as world:
        assert trained(world, VARIED, tmp_path / "run", *OPTIONS) == alone


@pytest.mark.slow
def test_the_same_bits_over_mpi(alone: str, tmp_path: Path) -> None:
    summary = harness.train("mpirun", 2, VARIED, tmp_path / "run", *OPTIONS)
    assert summary["world_size"] == 2
    assert digest(tmp_path / "run") == alone


def test_digits_has_the_same_bits_on_1_and_3_ranks(world1: KeptWorld, world3: KeptWorld, tmp_path: Path) -> None:
    options = ["--epochs", "3", "--deterministic", "--checkpoint-every", "5"]
    found = {trained(world, DIGITS, tmp_path / str(world.size), *options) for world in (world1, world3)}
    assert len(found) == 1


@pytest.mark.slow
def test_more_ranks_than_shards(worlds: KeptWorlds, tmp_path: Path) -> None:
    """And mixed precision with a loss scale, whose first steps are skipped."""
    options = ["--steps", "8", "--deterministic", "--virtual-shards", "3", "--amp", "fp16", "--clip-norm", "1"]
    found = [trained(worlds[ranks], DIGITS, tmp_path / str(ranks), *options) for ranks in (1, 2, 4)]
    assert found == found[:1] * 3


def test_another_number_of_ranks_in_mid_epoch(world2: KeptWorld, world3: KeptWorld, alone: str, tmp_path: Path) -> None:
    """2 ranks until step 7 of the first epoch's 15, in its warm-up, which is the same in either's schedule; then 3."""
    folder = tmp_path / "run"
    train(world2, VARIED, folder, *OPTIONS[2:], "--steps", "7")
    resumed = train(world3, VARIED, folder, "--resume", "--epochs", "2")
    assert (resumed["resumed_from"], resumed["world_size"], resumed["steps"]) == (7, 3, 30)
    assert digest(folder) == alone


def test_without_it_the_bits_depend_on_the_ranks(world1: KeptWorld, world3: KeptWorld, tmp_path: Path) -> None:
    options = ["--epochs", "1", "--threads", "1"]
    train(world1, DIGITS, tmp_path / "one", *options)
    train(world3, DIGITS, tmp_path / "three", *options)
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert any(not torch.equal(value, three[name]) for name, value in one.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_running_statistics_are_refused_by_name(ranks: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    assert refusal(worlds[ranks], NOISY, tmp_path / "run", "--deterministic") == (
        "--deterministic: training changes the buffer '1.running_mean' of a BatchNorm1d, which depends on the number "
        "of ranks; use a layer without such buffers, GroupNorm for instance"
    )
    assert not (tmp_path / "run").exists()


def test_plan_shows_the_virtual_shards(world1: KeptWorld, tmp_path: Path) -> None:
    train(world1, DIGITS, tmp_path / "run", "--steps", "1", "--deterministic")
    assert "batch     128 global = 1 rank x 12 passes x at most 11\n" in world1.printed[0]
    assert "gradient  deterministic 12 virtual shards, compression none, amp off\n" in world1.printed[0]


def test_an_operation_that_has_no_deterministic_form_is_named(world1: KeptWorld, tmp_path: Path) -> None:
    recipe = f"{Path(__file__).parent / 'odd_recipes.py'}:Scattered"
    text = refusal(world1, recipe, tmp_path / "run", "--deterministic")
    assert text.startswith("put_ has no deterministic form in torch on this device") and "\n" not in text
