"""A recipe that ends its process has failed, by name; what a recipe leaves running does not keep a run from ending."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, run
from tests.support.slow_cases import slow

RECIPE = str(ROOT / "tests" / "ranks" / "ending_recipe.py")
NO_START = """
import horovod.torch
from hvdtrain.comm.world import rank_from_environment
from recipes.digits import Digits as Base

class Digits(Base):
    pass

def fail(*_):
    raise RuntimeError("no connection to the others")

if rank_from_environment() == 0:
    horovod.torch.init = fail
"""


def launch(ranks: int, folder: Path, *options: str, launcher: str = "horovodrun") -> tuple[int, str]:
    """The exit code, and all that is printed."""
    command = [*HVDTRAIN, "launch", "-np", str(ranks), "--launcher", launcher, RECIPE, "--run-dir", str(folder / "run")]
    done = run("alone", 1, [*command, "--quiet", *options])
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("how", "where", "error"),
    [
        ("exit3", "score", "Ending.score() called sys.exit(3)"),
        ("exit-none", "model", "Ending.model() called sys.exit()"),
        ("exit-text", "dataset", "Ending.dataset('train') called sys.exit('no licence for this data')"),
    ],
)
def test_a_recipe_that_exits_has_failed(tmp_path: Path, how: str, where: str, error: str) -> None:
    done = run(
        "alone", 1, [*HVDTRAIN, "train", RECIPE, "--run-dir", str(tmp_path / "run"), "--how", how, "--where", where]
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"hvdtrain: error: {error}: a recipe must not end the process"


def test_the_rank_that_calls_sys_exit_is_named(tmp_path: Path) -> None:
    code, said = launch(3, tmp_path, "--how", "exit3", "--on", "1")
    assert code == 1 and "error: rank 1 on " in said and "failed: Ending.score() called sys.exit(3): " in said


@pytest.mark.parametrize("launcher", ["horovodrun", *slow("mpirun")])
def test_a_rank_that_vanishes_is_blamed(tmp_path: Path, launcher: str) -> None:
    code, said = launch(2, tmp_path, "--how", "os-exit0", "--on", "1", launcher=launcher)
    assert code == 1, said
    assert "hvdtrain: error: rank 1 on " in said, said
    assert "ended with code 0 and no message before it had finished" in said, said


@pytest.mark.slow
def test_a_rank_that_ends_with_a_code_and_no_message_is_blamed(tmp_path: Path) -> None:
    code, said = launch(2, tmp_path, "--how", "os-exit5", "--on", "1")
    assert code == 1 and "error: rank 1 on " in said and "ended with code 5 and no message" in said, said


@pytest.mark.slow
def test_a_rank_on_which_horovod_does_not_start_reports_why(tmp_path: Path) -> None:
    recipe = tmp_path / "no_start.py"
    recipe.write_text(NO_START)
    done = run("alone", 1, [*HVDTRAIN, "launch", "-np", "2", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert done.returncode == 1
    assert "error: rank 0 on " in done.stderr, done.stderr
    assert "failed: RuntimeError: no connection to the others" in done.stderr, done.stderr


@pytest.mark.parametrize("how", ["thread", "child", "fork"])
def test_the_process_ends_when_the_training_has(tmp_path: Path, how: str) -> None:
    begun = time.monotonic()
    options = ["--run-dir", str(tmp_path / "run"), "--quiet", "--how", how, "--once", str(tmp_path / "done")]
    done = run("alone", 1, [*HVDTRAIN, "train", RECIPE, *options], timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 10
    named = {"thread": "ending what the recipe left running: thread 'uploads'", "child": "process ", "fork": ""}
    assert named[how] in done.stderr
    assert time.monotonic() - begun < 60


def test_launch_ends_when_the_training_has(tmp_path: Path) -> None:
    code, said = launch(2, tmp_path, "--how", "child", "--once", str(tmp_path / "done"))
    assert code == 0, said
