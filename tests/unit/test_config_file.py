"""`--config` and `--print-config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdtrain.cli.main import main
from hvdtrain.cli.train import load_arguments
from hvdtrain.training.options import split_options

DIGITS = str(Path(__file__).parents[2] / "recipes" / "digits.py")


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(args))
    assert not left.value.code
    return capsys.readouterr().out


def test_flags_win_over_files_and_later_files_over_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.toml").write_text('amp = "bf16"\nwidth = 4\nsteps = 7\n')
    Path("two.json").write_text('{"recipe": {"width": 5, "lr": 1}, "run": {"seed": 3}}')
    args = ["--config", "one.toml", DIGITS, "--seed", "9", "--config", "two.json", "--epochs", "2"]
    recipe, run = split_options(*_load(args))
    assert (recipe.width, recipe.lr, recipe.epochs) == (5, 1.0, 2)  # type: ignore[attr-defined]
    assert (run.data.seed, run.data.steps, run.optimization.amp) == (9, None, "bf16")


def _load(args: list[str]):  # type: ignore[no-untyped-def]
    arguments = load_arguments(args)
    return arguments.recipe_class, arguments.given_options


@pytest.mark.parametrize("command", [["train"], ["launch", "-np", "2"]])
def test_printed_options_are_taken_back(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--width", "4", "--steps", "7", "--clip-norm", "2", "--logger", "tensorboard"]
    text = printed(capsys, *command, DIGITS, *given, "--print-config")
    (tmp_path / "all.json").write_text(text)
    assert json.loads(text)["recipe"]["width"] == 4 and json.loads(text)["run"]["steps"] == 7
    assert printed(capsys, *command, DIGITS, "--config", str(tmp_path / "all.json"), "--print-config") == text
    changed = printed(
        capsys, *command, DIGITS, "--config", str(tmp_path / "all.json"), "--epochs", "3", "--print-config"
    )
    assert json.loads(changed)["run"]["steps"] is None and json.loads(changed)["recipe"]["epochs"] == 3


def test_with_resume_the_runs_own_options_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        printed(capsys, "train", DIGITS, "--width", "4", "--seed", "5", "--print-config")
    )
    resume = ["--resume", "--run-dir", str(tmp_path), "--width", "6", "--print-config"]
    found = json.loads(printed(capsys, "train", DIGITS, *resume))
    assert (found["recipe"]["width"], found["run"]["seed"]) == (6, 5)
