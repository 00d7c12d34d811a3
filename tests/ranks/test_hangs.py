"""A rank that hangs is named with what it is in, and the run ends, or replaces it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, Job, launcher, wait_for_step

RECIPE = str(ROOT / "tests" / "ranks" / "ending_recipe.py")
HANGS = ["--how", "sleep", "--on", "1", "--quiet", "--log-every", "1"]
NOTICE = {"HVDTRAIN_HANG_NOTICE": "3"}


def test_launch_names_the_rank_that_hangs_and_ends(tmp_path: Path) -> None:
    command = [*HVDTRAIN, "launch", "-np", "2", RECIPE, "--run-dir", str(tmp_path / "run"), *HANGS]
    with Job([*command, "--where", "item", "--hang-limit", "20"], NOTICE) as job:
        done = job.finish()
    assert done.returncode == 1
    loads = r"rank 1 on \S+ has been loading its batch \(step 4, ending_recipe.py:\d+ in do\) for \d+ s"
    waits = r"rank 0 on \S+ waits for it while exchanging gradients \(step 4, collective '[\w.]+'\)"
    assert re.search(f"^hvdtrain: {loads}; {waits}$", done.stderr, re.M), done.stderr
    error = r"rank 1 on \S+ failed: it has been loading its batch \(.*\) for \d+ s: it hangs, by --hang-limit 20"
    assert re.search(f"^hvdtrain: error: {error}$", done.stderr, re.M), done.stderr


@pytest.mark.slow
def test_a_collective_that_one_rank_does_not_call_is_named(tmp_path: Path) -> None:
    """In `score`, with Horovod's own function; after 45 s if nothing else is set."""
    command = [*HVDTRAIN, "launch", "-np", "2", RECIPE, "--run-dir", str(tmp_path / "run"), "--how", "collective"]
    with Job([*command, "--on", "0", "--quiet", "--log-every", "1", "--hang-limit", "15"], NOTICE) as job:
        done = job.finish()
    assert done.returncode == 1
    lines = re.findall(r"^hvdtrain: (rank .*): they wait for each other$", done.stderr, re.M)  # more than one, if slow
    mine = r"rank 0 on \S+ has waited for \d+ s while computing gradients \(step 3, collective 'mean of mine', "
    mine += r"ending_recipe.py:\d+ in do\)"
    others = r"rank 1 on \S+ has waited for \d+ s while exchanging gradients \(step 3, collective '[\w.]+'\)"
    assert any(re.search(mine, line) and re.search(others, line) for line in lines), done.stderr


def test_without_launch_the_ranks_speak_for_themselves(tmp_path: Path) -> None:
    command = [*launcher("horovodrun", 2), *HVDTRAIN, "train", RECIPE, "--run-dir", str(tmp_path / "run"), *HANGS]
    with Job([*command, "--hang-limit", "20"], NOTICE) as job:
        done = job.finish()
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert re.search(r"hvdtrain: rank 1 on \S+ has been computing gradients \(step 3, \S+ in do\) for \d+ s", said), (
        said
    )
    assert re.search(r"hvdtrain: rank 0 on \S+ has been exchanging gradients \(step 3, collective '", said), said
    assert "hvdtrain: error: rank 1 on " in said and "it hangs, by --hang-limit 20" in said, said


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    command = [*HVDTRAIN, "launch", "-np", "2", RECIPE, "--run-dir", str(tmp_path / "run"), "--log-every", "1"]
    env = {**NOTICE, "HOROVOD_GLOO_TIMEOUT_SECONDS": "40"}
    with Job([*command, "--pause", "0.2", "--epochs", "100", "--hang-limit", "20"], env) as job:
        wait_for_step(tmp_path / "run", 3)
        stopped = next(process for process in job.ranks() if process.environ().get("HOROVOD_RANK") == "1")
        stopped.send_signal(signal.SIGSTOP)
        done = job.finish()
    assert done.returncode == 1
    assert re.search(r"^hvdtrain: error: rank 1 on \S+ does not .*: it is stopped by a signal", done.stderr, re.M), (
        done.stderr
    )


@pytest.mark.slow
def test_an_elastic_run_replaces_a_worker_that_hangs(tmp_path: Path) -> None:
    command = [
        *HVDTRAIN,
        "launch",
        "--elastic",
        "-H",
        "localhost:2",
        RECIPE,
        "--run-dir",
        str(tmp_path / "run"),
        *HANGS,
    ]
    with Job([*command, "--where", "item", "--hang-limit", "6", "--once", str(tmp_path / "done")], NOTICE) as job:
        done = job.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has been loading its batch" in done.stderr
    assert re.search(r"a worker on \S+ failed, the others continue: it has been loading its batch", done.stderr), (
        done.stderr
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["membership_changes"] >= 1
