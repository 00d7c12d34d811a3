"""`hvdtrain launch` on the hosts of a cluster, and what of it runs there."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.hosts.cluster import Host
from tests.ranks.elastic import losses
from tests.ranks.harness import BIN, HVDTRAIN, ROOT, train
from tests.support.limits import stretch
from tests.support.processes import kill_all

DIGITS = str(ROOT / "recipes" / "digits.py")
DIGITS_JAX = str(ROOT / "recipes" / "digits_jax.py")
HOROVODRUN = ["--launcher", "horovodrun"]
HOROVODRUN_MPI = ["--launcher", "horovodrun", "--controller", "mpi"]
MPIRUN = ["--launcher", "mpirun"]
SSHD = "sshd"


def losses_alone(folder: Path, *options: str, recipe: str = DIGITS) -> list[float]:
    """The losses of all steps of a recipe in a single process."""
    train("alone", 1, recipe, folder, *options, "--threads", "1")
    return losses(folder)


@contextmanager
def launched(
    hosts: Sequence[Host], where: str, run_dir: Path, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A training in the slots that `where` (h0:1,h1:1) names, launched on the first host.

    Afterwards nothing but sshd may run on any.
    """
    command = [*HVDTRAIN, "launch", "-H", where, *options, "--run-dir", str(run_dir), "--threads", "1"]
    environ = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # The hosts share this machine's cores, which Open MPI does not know.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        **(env or {}),
    }
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = hosts[0].popen(command, environ, text=True, **streams)
    try:
        yield process
        assert process.poll() is not None
        until = time.monotonic() + stretch(15)  # the guard gives 5 s between SIGTERM and SIGKILL
        while (left := at_work(hosts)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left, left
    finally:
        # Shown if the test fails.
        print("running:", *at_work(hosts), sep="\n")
        process.kill()
        print(*process.communicate(), sep="\n--- stderr\n")
        kill_all(at_work(hosts))


def at_work(hosts: Sequence[Host]) -> list[psutil.Process]:
    """All that runs on the hosts but for their sshd."""
    found = []
    for process in (process for host in hosts for process in host.processes()):
        with suppress(psutil.NoSuchProcess):
            if process.name() != SSHD:
                found.append(process)
    return found


def ranks(host: Host) -> list[psutil.Process]:
    """The ranks on a host."""
    found = []
    for process in host.processes():
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:4] == [*HVDTRAIN, "train"]:
                found.append(process)
    return found


def end(process: subprocess.Popen[str], seconds: float = 50) -> tuple[int, str, str]:
    """The exit code and output of a launch, when it has ended."""
    out, err = process.communicate(timeout=stretch(seconds))
    return process.returncode, out, err
