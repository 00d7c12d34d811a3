"""Running real ranks: horovodrun and mpirun on this host, with a time limit, leaving no process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.limits import stretch

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
HVDTRAIN = [sys.executable, "-m", "hvdtrain"]


def launcher(kind: str, ranks: int) -> list[str]:
    """The bare launcher's command line for `ranks` ranks on this host; [] for one process with none."""
    if kind == "alone":
        return []
    if kind == "horovodrun":
        return [str(BIN / "horovodrun"), "-np", str(ranks), "--gloo"]
    if kind == "horovodrun-mpi":  # what horovodrun chooses by itself where it is built with MPI
        return [str(BIN / "horovodrun"), "-np", str(ranks)]
    assert kind == "mpirun", kind
    # Tests may run as root, and on fewer cores than ranks.
    return [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]


class Job:
    """A running command; all it starts carries a mark in the environment, by which leftovers are found."""

    def __init__(
        self,
        command: list[str],
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        output: Path | None = None,
    ) -> None:
        """output: a file for all that is said, instead of what `finish` returns."""
        self.mark = uuid.uuid4().hex
        full = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HVDTRAIN_TEST_MARK": self.mark,
            **(env or {}),
        }
        said = output.open("w") if output else None
        self.process = subprocess.Popen(
            command,
            env=full,
            cwd=cwd,
            text=True,
            stdout=said or subprocess.PIPE,
            stderr=subprocess.STDOUT if said else subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        if said:
            said.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_processes(self.processes())
        self.process.communicate()

    def finish(self, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Wait for the end; fails if it takes longer or leaves a process."""
        try:
            out, err = self.process.communicate(timeout=stretch(timeout))
        except subprocess.TimeoutExpired:
            stacks = self.stacks()
            self.kill_processes(self.processes())
            out, err = self.process.communicate()
            text = f"no end within {stretch(timeout)} s\n--- stdout\n{out}\n--- stderr\n{err}\n--- stacks\n{stacks}"
            raise AssertionError(text) from None
        deadline = time.monotonic() + stretch(5)
        while (left_over := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill_processes(left_over)
        assert not left_over, f"left running: {left_over}\n{out}\n{err}"
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)

    def processes(self) -> list[psutil.Process]:
        """All living processes of this job."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HVDTRAIN_TEST_MARK") == self.mark and process.status() != "zombie":
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def stacks(self) -> str:
        """Where each of its processes is: what hangs may not hang again."""
        told = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                told.append(f"{process.pid}, child of {process.ppid()}: {' '.join(process.cmdline())[:200]}")
                dump = [str(BIN / "py-spy"), "dump", "--nonblocking", "--pid", str(process.pid)]
                told.append(
                    subprocess.run(dump, capture_output=True, text=True, timeout=stretch(30)).stdout
                )  # none of a shell
        return "\n".join(told)

    def ranks(self) -> list[psutil.Process]:
        """The job's living ranks: the processes that run `hvdtrain train` themselves."""
        return self.those(lambda process: process.cmdline()[1:4] == ["-m", "hvdtrain", "train"])

    def those(self, which: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
        """The living processes of this job of which that holds."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end while it is looked at
                if which(process):
                    found.append(process)
        return found

    def kill_processes(self, processes: Iterable[psutil.Process]) -> None:
        """Kill those of the processes that are still there."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def skip_or_fail(why: str | None) -> None:
    """Skip a test because of what this machine lacks, if anything; on CI nothing may be lacking."""
    if why and os.environ.get("CI") == "true":
        pytest.fail(f"{why} (and CI=true)")
    if why:
        pytest.skip(why)


def run(
    kind: str,
    ranks: int,
    command: list[str],
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 100,
) -> subprocess.CompletedProcess[str]:
    """Run a command on ranks and wait for its end."""
    with Job([*launcher(kind, ranks), *command], env, cwd) as job:
        return job.finish(timeout)


def train(kind: str, ranks: int, recipe: str, run_dir: Path, *options: str, **kwargs: Any) -> dict[str, Any]:
    """Train and return summary.json; fails with the output if the run did."""
    done = run(kind, ranks, [*HVDTRAIN, "train", recipe, "--run-dir", str(run_dir), *options], **kwargs)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads((run_dir / "summary.json").read_text())


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int, timeout: float = 60) -> None:
    """Return when a run has logged `step` steps."""
    deadline = time.monotonic() + stretch(timeout)
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run_dir} did not reach step {step} within {stretch(timeout)} s")
