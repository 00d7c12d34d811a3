"""A training whose output cannot be written trains to its end."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, Job, rows, run, wait_for_step
from tests.support.limits import stretch

SLOW = [str(ROOT / "tests" / "ranks" / "slow_recipe.py"), "--epochs", "1", "--log-every", "1"]


@pytest.mark.parametrize(
    ("redirection", "lost"),
    [
        ("> /dev/full", {"stdout": "No space left on device"}),
        ("2>&1 | true; exit ${PIPESTATUS[0]}", {"stdout": "Broken pipe"}),
        (">&- 2>&- <&-", {}),
    ],
)
def test_a_run_completes_though_nobody_can_read_it(redirection: str, lost: dict[str, str], tmp_path: Path) -> None:
    command = " ".join([*HVDTRAIN, "train", *SLOW, "--pause", "0", "--run-dir", str(tmp_path / "run")])
    done = run("alone", 1, ["bash", "-c", f"{command} {redirection}"])
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert {name: dropped["error"] for name, dropped in summary["output_dropped"].items()} == lost
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, summary["steps"] + 1))


def test_a_run_completes_though_its_terminal_is_closed(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [*HVDTRAIN, "train", *SLOW, "--pause", "0.2", "--run-dir", str(tmp_path / "run")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A session of its own, whose terminal this is not: closing it sends no SIGHUP.
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environ, cwd=ROOT
    )
    os.close(slave)
    try:
        wait_for_step(tmp_path / "run", 1)
        os.close(master)
        assert process.wait(stretch(60)) == 0
    finally:
        process.kill()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["output_dropped"]["stderr"]["error"] == "Input/output error"
    assert (tmp_path / "run" / "checkpoints" / f"step-{summary['steps']}").is_dir()


def test_the_launcher_completes_though_its_disk_is_full(tmp_path: Path) -> None:
    command = " ".join([*HVDTRAIN, "launch", "-np", "2", *SLOW, "--pause", "0", "--run-dir", str(tmp_path / "run")])
    with Job(["bash", "-c", f"{command} > /dev/full 2>&-"]) as job:
        assert job.finish().returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
