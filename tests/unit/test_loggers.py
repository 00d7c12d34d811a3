"""Loggers: chosen by --logger, also from another distribution; one that fails does not end the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.distributions import write_distribution
from tests.support.limits import stretch

ROOT = Path(__file__).parents[2]
OUTSIDE = """
import json
from pathlib import Path
from hvdtrain.system.plugins import registering
from hvdtrain.training.logger import LOGGERS, Logger

@registering(LOGGERS, "lines")
class LineLogger(Logger):
    def __init__(self, run_dir):
        self.file = open(run_dir / "lines", "w")
        self.view_command = f"cat {run_dir}/lines"
    def log_row(self, row):
        print("row", row.step, sorted(row.train), sorted(row.eval), file=self.file)
    def log_summary(self, summary):
        print("summary", summary["steps"], summary["best"]["metric"], file=self.file)
    def close(self):
        self.file.close()

@registering(LOGGERS, "failing")
class FailingLogger(Logger):
    def log_row(self, row):
        raise ConnectionError("no server")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which a distribution of loggers is installed."""
    site, module = tmp_path / "site", tmp_path / "outside_loggers.py"
    site.mkdir()
    module.write_text(OUTSIDE)
    write_distribution(
        site, module, {"hvdtrain.loggers:lines": "LineLogger", "hvdtrain.loggers:failing": "FailingLogger"}
    )
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def train(run_dir: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    recipe = str(ROOT / "recipes" / "linear_regression.py")
    command = [sys.executable, "-m", "hvdtrain", "train", recipe, "--steps", "3", "--log-every", "1"]
    command += ["--run-dir", str(run_dir), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=stretch(100), env=environment)


def test_a_logger_of_another_distribution_gets_rows_and_the_summary(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    run_dir = tmp_path / "run"
    done = train(run_dir, environment, "--logger", "lines", "--logger", "failing", "--logger", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert (run_dir / "lines").read_text().splitlines() == [
        "row 1 ['loss'] []",
        "row 2 ['loss'] []",
        "row 3 ['loss'] ['loss']",
        "summary 3 loss",
    ]
    failure = "the logger 'failing' failed and is left out from now on: ConnectionError: no server"
    assert done.stderr.count(failure) == 1
    best = json.loads((run_dir / "summary.json").read_text())["best"]
    assert done.stdout.splitlines()[-3:] == [
        f"best      loss {best['value']:.4f} at step 3",
        next(line for line in done.stdout.splitlines() if line.startswith("trained   3 steps, ")),
        f"results   {run_dir}/summary.json, cat {run_dir}/lines, tensorboard --logdir {run_dir}",
    ]
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        *("train/loss", "train/lr", "train/epoch", "eval/loss", "speed/samples_per_second", "speed/comm_seconds")
    }


def test_without_tensorboard_among_them_there_is_no_such_folder(tmp_path: Path, environment: dict[str, str]) -> None:
    done = train(tmp_path / "run", environment, "--logger", "lines")
    assert done.returncode == 0 and not (tmp_path / "run" / "tensorboard").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["logger"] == ["lines"]


def test_a_logger_that_is_not_there_is_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    done = train(tmp_path / "run", environment, "--logger", "line")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "hvdtrain: error: 'line' is not a logger; expected one of tensorboard, lines, failing; did you mean 'lines'?",
    )
