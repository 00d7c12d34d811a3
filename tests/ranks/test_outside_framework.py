"""A framework is one file, which may be in a package outside hvdtrain: here linear regression in numpy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, rows, run, train
from tests.support.distributions import write_distribution

LINE = """
from dataclasses import dataclass
import numpy as np
from numpy_framework import Recipe

@dataclass(kw_only=True)
class Line(Recipe):
    epochs: int = 20
    batch_size: int = 10
    def arrays(self):
        x = np.random.default_rng(0).normal(size=(95, 3))
        return x, x @ np.array([1.0, -2.0, 3.0])
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a recipe, and in `installed` the package with its framework."""
    (tmp_path / "installed").mkdir()
    module = Path(__file__).with_name("numpy_framework.py")
    write_distribution(tmp_path / "installed", module, {"hvdtrain.frameworks:numpy": "FRAMEWORK"})
    (tmp_path / "line.py").write_text(LINE)
    return tmp_path


def paths(package: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{package / 'installed'}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(("kind", "ranks"), [("alone", 1), ("horovodrun", 2)])
def test_it_trains_on_any_number_of_ranks(kind: str, ranks: int, package: Path) -> None:
    done = train(kind, ranks, str(package / "line.py"), package / "run", env=paths(package))
    assert (done["framework"], done["world_size"], done["steps"]) == ("numpy", ranks, 200)
    assert done["eval"]["loss"] < 1e-3
    assert done["samples_seen"] == 20 * 95


@pytest.mark.slow
def test_launch_trains_and_resumes_it(package: Path) -> None:
    line = [*HVDTRAIN, "launch", "-np", "2", str(package / "line.py"), "--run-dir", str(package / "run")]
    for more in (["--steps", "20"], ["--resume", "--epochs", "20"]):
        done = run("alone", 1, [*line, *more], env=paths(package))
        assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(package / "run")][-1] == 200
    assert json.loads((package / "run" / "summary.json").read_text())["eval"]["loss"] < 1e-3
    verified = run("alone", 1, [*HVDTRAIN, "ledger", "verify", str(package / "run")])
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_without_the_package_the_error_is_one_line(package: Path) -> None:
    text = "from hvdtrain.recipe.base import Recipe\n"
    (package / "own.py").write_text(f"{text}class Own(Recipe):\n    framework = 'numpy'\n")
    done = run("alone", 1, [*HVDTRAIN, "train", str(package / "own.py")])
    assert done.returncode == 2
    assert done.stderr == (
        "hvdtrain: error: Own.framework is 'numpy'; expected 'jax', 'keras', 'torch': derive the recipe from "
        "hvdtrain.jax.Recipe, hvdtrain.keras.Recipe or hvdtrain.torch.Recipe\n"
    )
