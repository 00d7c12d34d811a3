"""A closed terminal stops a run as SIGTERM does, though importing horovod.torch would let SIGHUP go unnoticed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, Job, wait_for_step
from tests.support.slow_cases import slow

RECIPE = str(ROOT / "tests" / "ranks" / "ending_recipe.py")
SLOW = ["--pause", "0.1", "--epochs", "100", "--log-every", "1", "--quiet"]


@pytest.mark.parametrize("command", [*slow(["train"]), ["launch", "-np", "2"]], ids=["train", "launch"])
def test_a_closed_terminal_stops_and_saves(tmp_path: Path, command: list[str]) -> None:
    with Job([*HVDTRAIN, *command, RECIPE, "--run-dir", str(tmp_path / "run"), *SLOW]) as job:
        wait_for_step(tmp_path / "run", 3)
        job.process.send_signal(signal.SIGHUP)
        job.process.send_signal(signal.SIGHUP)  # to the process and to its group
        done = job.finish()
    assert done.returncode == 75, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not summary["finished"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{summary['steps']}").is_dir()
