"""A compressor is one file: one in a distribution outside of hvdtrain works wherever hvdtrain's own do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.ranks.harness import HVDTRAIN, ROOT, rows, run, train
from tests.support.distributions import write_distribution

DIGITS, MLP = (str(ROOT / "recipes" / f"{name}.py") for name in ("digits", "mlp"))


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """The environment in which a distribution with the compressor is installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    module = Path(__file__).with_name("outside_compressor.py")
    write_distribution(folder, module, {"hvdtrain.compressors:halves": "Halves"})
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def test_it_trains_and_resumes_bit_for_bit(outside: dict[str, str], tmp_path: Path) -> None:
    """Its state is in the checkpoint: one value of two in each step, whatever step the run is resumed at."""
    options = ["--compression", "halves,min=100,warmup=0", "--checkpoint-residuals", "exact", "--log-every", "1"]
    options += ["--threads", "1", "--steps", "15", "--checkpoint-every", "7", "--eval-every", "100"]
    whole = train("horovodrun", 2, DIGITS, tmp_path / "whole", *options, env=outside)
    assert whole["compression"] == "halves,min=100,warmup=0"
    assert {bucket["compression"] for bucket in whole["buckets"]} == {"none", "halves:2"}
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)
    for step in (14, 15):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{step}")
    states = torch.load(tmp_path / "resumed" / "checkpoints" / "step-7" / "state", weights_only=True)
    assert set(states["exchange"]["bases"].values()) == {1}  # seven steps of it
    resumed = train("horovodrun", 2, DIGITS, tmp_path / "resumed", "--resume", env=outside)
    assert resumed["resumed_from"] == 7
    losses, others = ([row["loss"] for row in rows(tmp_path / name)] for name in ("resumed", "whole"))
    assert losses == others


@pytest.mark.slow
def test_auto_tries_it(outside: dict[str, str], tmp_path: Path) -> None:
    options = ["--compression", "auto,min=64", "--threads", "1"]
    train("horovodrun", 2, DIGITS, tmp_path / "run", *options, env=outside)
    advice = json.loads((tmp_path / "run" / "advisor.json").read_text())
    assert any(set(row["choice"]) == {"halves:2"} for row in advice["rows"])


@pytest.mark.slow
def test_bench_compression_measures_it(outside: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--steps", "3", "--json", "rows.json", MLP, "--width", "100"]
    done = run("alone", 2, [*HVDTRAIN, "bench", "compression", *arguments], env=outside, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert next(iter(found)) == "none" and len(found) == 10
    assert 0.4 < found["halves:2"]["wire_bytes"] / found["none"]["wire_bytes"] < 0.7  # not the biases
    assert 0.6 < found["halves:2"]["cosine"] < 0.98  # half of the values of the large matrix


def test_the_help_names_it(outside: dict[str, str], tmp_path: Path) -> None:
    done = run("alone", 1, [*HVDTRAIN, "train", DIGITS, "--help"], env=outside, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "halves:2 (values of which one is sent)" in " ".join(done.stdout.split())


def test_its_argument_is_checked(outside: dict[str, str], tmp_path: Path) -> None:
    for spec, problem in (
        ("halves:0", "'0' is not a valid stride; expected an integer of at least 1"),
        ("halvs", "'halvs' is not a method; did you mean 'halves'?"),
    ):
        done = run("alone", 1, [*HVDTRAIN, "train", DIGITS, "--compression", spec], env=outside, cwd=tmp_path)
        assert done.returncode == 2
        assert f"compression {spec!r}: {problem}" in done.stderr
