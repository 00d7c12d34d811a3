"""What users do that the shipped recipes do not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

ODD = str(Path(__file__).parent / "odd_recipes.py")
EXACT = f"{Path(__file__).parent / 'exact_recipe.py'}:Exact"


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / f"step-{step}" / "state", weights_only=True)["model"]


@pytest.mark.parametrize(("ranks", "micro", "passes"), [(1, 16, 1), (2, 8, 1), (2, 4, 2), (2, 3, 3)])
def test_running_statistics_with_accumulation(
    ranks: int, micro: int, passes: int, worlds: KeptWorlds, tmp_path: Path
) -> None:
    """9 steps of `passes` passes per rank, each moving the running mean a tenth of the way to 3."""
    options = ["--epochs", "3", "--micro-batch", str(micro)]
    train(worlds[ranks], f"{ODD}:ConstantNorm", tmp_path / "run", *options)
    state = weights(tmp_path / "run", 9)
    expected = torch.full((5,), 3 * (1 - 0.9 ** (9 * passes)), dtype=torch.float64)
    torch.testing.assert_close(state["0.running_mean"], expected, rtol=1e-5, atol=1e-5)
    assert state["0.num_batches_tracked"] == 9 * passes


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_leaves_no_trace(ranks: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    options = ["--epochs", "3", "--skip-nonfinite", "3", "--log-every", "1"]
    summary = train(worlds[ranks], f"{ODD}:NanInput", tmp_path / "run", *options)
    assert summary["skipped_nonfinite"] == 3
    assert math.isfinite(summary["eval"]["loss"])
    assert math.isfinite(summary["train_loss"])
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run", 9).values())


@pytest.mark.parametrize("more", [["--batch-size", "4"], ["--batch-size", "50"], ["--batch-per-rank", "9"]])
def test_resume_with_another_batch_size_still_trains_its_epochs(
    more: list[str], world1: KeptWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(world1, EXACT, folder, "--steps", "40", "--batch-size", "16", "--log-every", "1")
    summary = train(world1, EXACT, folder, "--resume", "--epochs", "3", "--log-every", "1", *more)
    assert summary["samples_seen"] == 3 * 1003
    assert summary["epochs"] == 3
    assert [row["step"] for row in rows(folder)] == list(range(1, summary["steps"] + 1))


def test_namedtuples_and_fields_that_are_worked_out(world2: KeptWorld, tmp_path: Path) -> None:
    train(world2, f"{ODD}:Named", tmp_path / "run", "--steps", "10")
    assert "double" not in json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    summary = train(world2, f"{ODD}:Named", tmp_path / "run", "--resume", "--steps", "20")
    assert summary["steps"] == 20


@pytest.mark.parametrize("option", ["--sparse-adam", "--no-sparse-adam"])
def test_sparse_gradients_agree_on_any_number_of_ranks(option: str, worlds: KeptWorlds, tmp_path: Path) -> None:
    losses = []
    for ranks in (1, 3):
        train(worlds[ranks], f"{ODD}:Embedding", tmp_path / str(ranks), option, "--log-every", "1")
        losses.append([row["loss"] for row in rows(tmp_path / str(ranks))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    first, last = [row["eval_loss"] for row in rows(tmp_path / "1") if "eval_loss" in row]
    assert last < first


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (
            "Mean",
            "Mean.score must return one value per example: 'loss' should have shape (7,) for 7 examples, got shape ()",
        ),
        ("Forgets", "Forgets.score must always return the same scores: first loss, within, now loss"),
        ("WrongBest", "WrongBest.best: there is no metric 'withing'; did you mean 'within'?"),
        ("Column", "Column.score: 'lr' is a column of metrics.jsonl; rename it"),
        (
            "Rebinds",
            "training rebinds the buffer '0.mean' of a RunningMean to another tensor, so that it cannot be "
            "kept the same on all ranks: change it in place, self.mean.copy_(...)",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_named(recipe: str, error: str, world1: KeptWorld, tmp_path: Path) -> None:
    assert refusal(world1, f"{ODD}:{recipe}", tmp_path / "run", "--steps", "3") == error


def test_ranks_with_other_data_are_refused(world2: KeptWorld, tmp_path: Path) -> None:
    text = refusal(world2, f"{ODD}:RankData", tmp_path / "run")
    assert "the recipe's 'train' dataset has 101 examples on rank 1 and 100 on rank 0: all ranks need" in text
