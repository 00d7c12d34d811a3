"""A training that ends before its last step: by the recipe's `evaluated`, by --patience; and what `logged` gets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdtrain.system.errors import RecipeError, RunError, UserError
from tests.ranks.elastic import verify
from tests.ranks.harness import ROOT, rows
from tests.support.worlds import KeptWorld, refusal, train, train_here

RECIPES = Path(__file__).parent / "ending_early_recipes.py"
WAVE, STOPS = f"{RECIPES}:Wave", f"{RECIPES}:Stops"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(world2: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run on 2 ranks that `evaluated` has ended, its summary and what rank 0 printed."""
    folder = tmp_path_factory.mktemp("stopped")
    options = ["--notes", str(folder), "--eval-every", "1", "--log-every", "2", "--ema", "0.5"]
    return folder, train(world2, STOPS, folder / "run", *options), world2.printed[0]


def test_evaluated_ends_the_training_finished_and_saved(stopped: tuple[Path, dict[str, Any], str]) -> None:
    """The weight falls by 0.1 a step, its average with half the distance: |average| is smallest after step 11 of 100.

    a(k) = a(k-1)/2 + w(k)/2 with w(k) = 1 - k/10.
    """
    folder, summary, printed = stopped
    average, weights = None, []
    for k in range(1, 14):
        average = (1 - k / 10) if average is None else average / 2 + (1 - k / 10) / 2
        weights.append(average)
    assert min(map(abs, weights)) == abs(weights[10])
    assert (summary["steps"], summary["finished"]) == (13, True)
    assert summary["ended"] == "Stops.evaluated() returned True"
    assert summary["best"]["step"] == min((2, 4, 6, 8, 10, 12, 13), key=lambda k: abs(weights[k - 1]))
    assert (folder / "run" / "checkpoints" / "step-13").is_dir()
    assert "ended     at step 13 of 100: Stops.evaluated() returned True" in printed
    verify(folder / "run")
    assert summary["versions"]["torch"] == torch.__version__  # with the build, as in +cu130
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (summary["git_commit"] or "").removesuffix("-dirty") == commit.stdout.strip()
    seen = [read_lines(folder / f"evaluated-{rank}") for rank in range(2)]
    assert seen[0] == seen[1]  # metrics, the averaged model, and what it draws
    assert [line["step"] for line in seen[0]] == list(range(1, 14))
    assert [line["weight"] for line in seen[0]] == pytest.approx(weights)
    assert [line["loss"] for line in seen[0]] == pytest.approx([abs(weight) for weight in weights])
    assert not any(line["training"] for line in seen[0])


@pytest.mark.parametrize("option", ["--quiet", "--deterministic"])
def test_evaluated_may_call_backward(option: str, world2: KeptWorld, tmp_path: Path) -> None:
    """The weight falls by 0.1 a step: no gradient of another pass is in a step."""
    summary = train(world2, f"{RECIPES}:Saliency", tmp_path / "run", "--eval-every", "1", "--steps", "8", option)
    assert summary["eval"]["loss"] == pytest.approx(0.2)


def test_logged_gets_each_row_on_rank_0_as_it_was_written(stopped: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = stopped
    assert read_lines(folder / "logged-0") == rows(folder / "run")
    assert not (folder / "logged-1").exists()


def test_resume_does_not_continue_a_training_that_has_ended(
    stopped: tuple[Path, dict[str, Any], str], world1: KeptWorld
) -> None:
    folder, before, _ = stopped
    summary = train(world1, STOPS, folder / "run", "--resume")
    assert (summary["steps"], summary["finished"], summary["ended"]) == (13, True, before["ended"])
    assert "resumed   at step 13, where the training has ended: Stops.evaluated() returned True" in world1.printed[0]
    assert summary["eval"] == before["eval"]


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("raises", RecipeError, "rank 1 on {host}: Stops.evaluated() raised ValueError: cannot draw"),
        ("returns a text", RunError, "Stops.evaluated() returned 'yes', str; expected True to end the training"),
        ("ranks differ", RunError, "Stops.evaluated() returned True on rank 1 and False on rank 0 at step 2: it must"),
    ],
)
def test_what_evaluated_may_not_do_ends_the_run_on_all_ranks(
    kind: str, error: type[Exception], text: str, world2: KeptWorld, tmp_path: Path
) -> None:
    import socket

    options = ("--notes", str(tmp_path), "--kind", kind, "--steps", "4")
    errors = world2.errors(train_here, STOPS, tmp_path / "run", options)
    assert {type(one) for one in errors} == {error}
    assert all(str(one).startswith(text.format(host=socket.gethostname())) for one in errors)


def test_logged_that_raises_is_warned_of_once_and_not_called_again(world1: KeptWorld, tmp_path: Path) -> None:
    options = ["--notes", str(tmp_path), "--kind", "logged raises", "--steps", "8", "--log-every", "2"]
    summary = train(world1, STOPS, tmp_path / "run", *options)
    assert summary["steps"] == 8
    assert [row["step"] for row in read_lines(tmp_path / "logged-0")] == [2, 4]
    warning = "hvdtrain: warning: Stops.logged() raised OSError: no route to tracker; it is not called any more"
    assert world1.printed[0].count(warning) == 1


def test_patience_ends_at_the_same_step_on_any_ranks_and_through_a_resume(
    world1: KeptWorld, world2: KeptWorld, tmp_path: Path
) -> None:
    """The loss |1 - k/10| after step k is best after step 10; --patience 3 ends after step 13."""
    options = ["--eval-every", "1", "--patience", "3"]
    summaries = [train(world, WAVE, tmp_path / f"run{i}", *options) for i, world in enumerate((world1, world2))]
    train(world2, WAVE, tmp_path / "run2", *options, "--steps", "11")
    summaries.append(train(world1, WAVE, tmp_path / "run2", "--resume", "--epochs", "50"))
    for summary in summaries:
        assert (summary["steps"], summary["finished"]) == (13, True)
        assert summary["ended"] == "3 evaluations without a better loss (--patience)"
    assert summaries[0]["eval"] == summaries[1]["eval"] == summaries[2]["eval"]


def test_patience_without_an_evaluation_is_refused(world2: KeptWorld, tmp_path: Path) -> None:
    text = refusal(world2, f"{Path(__file__).parent / 'now_recipe.py'}:NoSets", tmp_path / "run", "--patience", "2")
    assert text.startswith("--patience 2 counts evaluations, and NoSets has none: evals is ()")
    assert UserError("").exit_code == 2


def test_plateau_lowers_the_rate_at_the_same_step_on_any_ranks_and_through_a_resume(
    world1: KeptWorld, world2: KeptWorld, tmp_path: Path
) -> None:
    """The loss |weight| is smallest after step 10; two evaluations later the rate is halved, and so on."""
    options = ["--eval-every", "1", "--log-every", "1", "--schedule", "plateau:2 x0.5"]
    train(world1, WAVE, tmp_path / "run0", *options, "--steps", "18")
    train(world2, WAVE, tmp_path / "run1", *options, "--steps", "11")
    train(world1, WAVE, tmp_path / "run1", "--resume", "--steps", "18")
    rates = [[row["lr"] for row in rows(tmp_path / name)] for name in ("run0", "run1")]
    assert rates[0] == rates[1] == [0.1] * 12 + [0.05] * 2 + [0.025] * 2 + [0.0125] * 2
    assert "lr        2 evaluations without a better loss: times 0.5 from step 14 on" in world1.printed[0]
