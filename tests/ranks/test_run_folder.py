"""One owner of a run folder, and what happens to a run whose folder is not there or not its own any more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, Job, rows, run, train, wait_for_step

SLOW = str(ROOT / "tests" / "ranks" / "slow_recipe.py")
OPTIONS = ["--pause", "0.15", "--epochs", "2", "--log-every", "1", "--checkpoint-every", "5"]
STEPS = 24
RESUME = [*HVDTRAIN, "train", SLOW, "--resume", "--run-dir"]


def start(folder: Path, *more: str, **environ: str) -> Job:
    return Job([*HVDTRAIN, "train", SLOW, "--run-dir", str(folder), *OPTIONS, *more], env=environ)


def check_whole(folder: Path) -> None:
    """Every row is there once and in order, and every example was visited once."""
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    verified = run("alone", 1, [*HVDTRAIN, "ledger", "verify", str(folder)])
    assert verified.stdout.startswith("exactly once: 2 epochs x "), verified.stdout
    assert not list(folder.glob("**/.*")) and not (folder / "owner.json").exists()


def test_of_two_runs_started_together_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder) as first, start(folder) as second:
        ended = [first.finish(), second.finish()]
    refused, whole = sorted(ended, key=lambda done: -done.returncode)
    assert (whole.returncode, refused.returncode) == (0, 2), refused.stderr
    assert refused.stderr.startswith(f"hvdtrain: error: run folder {folder} ")
    assert len(refused.stderr.splitlines()) == 1
    check_whole(folder)


def test_a_run_is_not_resumed_while_it_runs_and_at_once_when_it_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder, "--pause", "1") as first:
        wait_for_step(folder, 1)
        assert (folder / "config.json").stat().st_mode & 0o777 == 0o600
        refused = run("alone", 1, [*RESUME, str(folder)])
        who = f"run folder {folder} is in use by pid {first.process.pid} on {os.uname().nodename}, which renewed"
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"hvdtrain: error: {who} its lease ")
        assert len(refused.stderr.splitlines()) == 1
        wait_for_step(folder, 6)
        first.process.kill()
    # What a run leaves that is killed while it writes, and what a power loss leaves of its last rows.
    leftovers = ["checkpoints/.step-10.new/state", ".config.json.new", "ledger/.segment-000002.csv.0a1b2c3d"]
    leftovers += [".owner.json.0a1b2c3d", "checkpoints/.best.new"]
    for name in leftovers:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:3], *lines[4:], lines[0][:9]]))
    saved = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    begin = time.monotonic()
    done = run("alone", 1, [*RESUME, str(folder), "--pause", "0"])
    assert done.returncode == 0 and time.monotonic() - begin < 60
    later = len(lines) - saved
    removed = f"{later} row{'s' * (later > 1)} after step {saved} removed; " if later else ""
    rest = f"{saved - 1} of {saved} rows up to step {saved} are there, the last of step {saved}"
    text = f"{removed}1 damaged line removed; {rest}"
    assert done.stderr == f"hvdtrain: warning: metrics.jsonl: {text}\n"
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, *range(5, STEPS + 1)]
    assert not list(folder.glob("**/.*"))


def test_a_run_that_was_frozen_stops_before_it_writes_to_a_folder_that_was_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder, HVDTRAIN_FOLDER_LEASE="2") as first:
        wait_for_step(folder, 7)
        first.process.send_signal(signal.SIGSTOP)
        resumed = run("alone", 1, [*RESUME, str(folder)], env={"HVDTRAIN_FOLDER_LEASE": "2"})
        assert resumed.returncode == 0, resumed.stderr
        assert "waiting up to 2 s, as that run may have died" in resumed.stderr
        check_whole(folder)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        first.process.send_signal(signal.SIGCONT)
        lost = first.finish()
    assert lost.returncode == 1
    assert "is gone: another run took the folder over and has ended, or it was deleted" in lost.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced", "metrics", "config"])
def test_a_folder_that_is_lost_in_mid_run_ends_the_run(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder) as job:
        wait_for_step(folder, 2)
        if how in ("moved", "replaced"):
            folder.rename(tmp_path / "moved")
        if how == "replaced":
            shutil.copytree(tmp_path / "moved", folder, symlinks=True)
        if how == "deleted":
            subprocess.run(["rm", "-rf", str(folder)], check=True)
        if how == "metrics":
            (folder / "metrics.jsonl").unlink()
        if how == "config":
            (folder / "config.json").unlink()
        done = job.finish()
    text = {
        "moved": f"run folder {folder} was deleted, moved or unmounted during the run",
        "deleted": f"run folder {folder} was deleted, moved or unmounted during the run",
        "replaced": f"run folder {folder} was replaced by a copy during the run",
        "metrics": f"metrics.jsonl in run folder {folder} was deleted or replaced during the run",
        "config": f"config.json in run folder {folder} was deleted or replaced during the run",
    }[how]
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"hvdtrain: error: {text}")
    assert "Traceback" not in done.stderr
    assert folder.exists() == (how not in ("moved", "deleted"))
    assert not (folder / "summary.json").exists()


def test_checkpoints_without_their_options_are_not_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("alone", 1, SLOW, folder, "--pause", "0", "--steps", "2", "--checkpoint-every", "1")
    (folder / "config.json").rename(folder / "kept")
    done = run("alone", 1, [*RESUME, str(folder)])
    assert done.returncode == 2
    text = f"run folder {folder} has checkpoints and no config.json, which holds the options that they were trained"
    assert done.stderr.startswith(f"hvdtrain: error: {text}") and len(done.stderr.splitlines()) == 1
    fresh = run("alone", 1, [*HVDTRAIN, "train", SLOW, "--run-dir", str(folder)])
    assert (fresh.returncode, "already holds a run" in fresh.stderr) == (2, True)

    # Under `launch --relaunch` nobody chooses another checkpoint.
    (folder / "kept").rename(folder / "config.json")
    state = folder / "checkpoints" / "step-2" / "state"
    state.write_bytes(state.read_bytes()[:-1])
    command = [*RESUME, str(folder), "--steps", "3"]
    assert run("alone", 1, command).returncode == 2
    unattended = run("alone", 1, command, env={"HVDTRAIN_RELAUNCH": "0123"})
    assert unattended.returncode == 0, unattended.stderr
    warnings = unattended.stderr.splitlines()
    assert warnings[0].startswith(f"hvdtrain: warning: {folder}/checkpoints/step-2 is damaged: its state has ")
    assert warnings[1] == "hvdtrain: warning: resuming from step-1, the newest checkpoint that is not damaged"
    assert json.loads((folder / "summary.json").read_text())["resumed_from"] == 1


def test_files_that_may_not_grow_end_no_run_but_the_last_checkpoint_must_be_written(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: what is larger fails with EFBIG, at checkpoints in mid-run and at the end."""
    folder = tmp_path / "run"
    command = " ".join([*HVDTRAIN, "train", SLOW, "--run-dir", str(folder), *OPTIONS, "--pause", "0"])
    done = run("alone", 1, ["bash", "-c", f"ulimit -f 8; {command}"])  # KiB
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert lines[-1].startswith(
        f"hvdtrain: error: cannot write step {STEPS}'s checkpoint (its files) in {folder}: File"
    )
    goes_on = [line for line in lines if line.endswith("; training continues, the next checkpoint is tried again")]
    assert len(goes_on) == 4
    assert len(rows(folder)) == STEPS and not list(folder.glob("**/.*"))


def test_a_relaunched_job_passes_over_a_damaged_checkpoint_at_night(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [SLOW, "--run-dir", str(folder), *OPTIONS, "--pause", "0"]
    train("alone", 1, SLOW, folder, *OPTIONS, "--pause", "0")
    (folder / "checkpoints" / f"step-{STEPS}" / "meta.json").write_text("{")
    launched = [*HVDTRAIN, "launch", "--elastic", "-H", "localhost:1", "--relaunch", "1", *options, "--resume"]
    done = run("alone", 1, launched)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step-{STEPS} is damaged: its meta.json is not valid JSON" in done.stderr
    assert "resuming from step-20, the newest checkpoint that is not damaged" in done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["resumed_from"], summary["steps"]) == (20, STEPS)
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    assert not (folder / "owner.json").exists()
    assert (folder / "source").stat().st_mode & 0o777 == 0o700
