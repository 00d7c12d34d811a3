"""`hvdtrain launch` over real hosts: through ssh, with processes and interfaces that are not this host's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.hosts.cluster import Host, cluster
from tests.ranks.harness import BIN, HVDTRAIN, ROOT, rows, train, wait_for_step

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")

DIGITS = str(ROOT / "recipes" / "digits.py")
TWO_EPOCHS = ["--epochs", "2", "--log-every", "1"]
HOROVODRUN = ["--launcher", "horovodrun"]
HOROVODRUN_MPI = ["--launcher", "horovodrun", "--controller", "mpi"]
MPIRUN = ["--launcher", "mpirun"]
SSHD = "sshd"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of all steps in a single process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train("alone", 1, DIGITS, folder, *TWO_EPOCHS, "--threads", "1")
    return [row["loss"] for row in rows(folder)]


@pytest.fixture(scope="module")
def two() -> Iterator[list[Host]]:
    with cluster(2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def debian() -> Iterator[list[Host]]:
    """Hosts whose own name is 127.0.1.1."""
    with cluster(2, loopback_names=True) as hosts:
        yield hosts


@contextmanager
def launched(hosts: Sequence[Host], run_dir: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Digits on one rank of each host, launched on the first; afterwards nothing but sshd may run on any."""
    where = ["-H", ",".join(f"{host.name}:1" for host in hosts), "--nic", "eth0"]
    command = [*HVDTRAIN, "launch", *where, *options, "--run-dir", str(run_dir), "--threads", "1"]
    environ = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = hosts[0].popen(command, environ, text=True, **streams)
    try:
        yield process
        assert process.poll() is not None
        until = time.monotonic() + 15  # the guard gives 5 s between SIGTERM and SIGKILL
        while (left := at_work(hosts)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left, left
    finally:
        # Shown if the test fails.
        print("running:", *at_work(hosts), sep="\n")
        process.kill()
        print(*process.communicate(), sep="\n--- stderr\n")
        for left_over in at_work(hosts):
            with suppress(psutil.NoSuchProcess):
                left_over.kill()


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
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.parametrize("way", [MPIRUN, HOROVODRUN_MPI], ids=" ".join)
def test_digits_over_two_hosts_by_mpi_is_as_in_one_process(
    way: list[str], two: list[Host], alone: list[float], tmp_path: Path
) -> None:
    check_same_losses(way, two, alone, tmp_path / "run")


def test_digits_over_two_debian_hosts_by_gloo_is_as_in_one_process(
    debian: list[Host], alone: list[float], tmp_path: Path
) -> None:
    check_same_losses(HOROVODRUN, debian, alone, tmp_path / "run")


def check_same_losses(way: list[str], hosts: list[Host], alone: list[float], run_dir: Path) -> None:
    with launched(hosts, run_dir, *way, DIGITS, *TWO_EPOCHS) as process:
        while process.poll() is None and not all(ranks(host) for host in hosts):
            time.sleep(0.1)
        spread = [len(ranks(host)) for host in hosts]
        code, out, err = end(process)
    assert code == 0, f"{out}\n{err}"
    assert spread == [1, 1]
    assert len(alone) == 24
    assert [row["loss"] for row in rows(run_dir)] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("way", [HOROVODRUN, MPIRUN], ids=" ".join)
def test_ctrl_c_saves_and_leaves_no_rank(way: list[str], two: list[Host], tmp_path: Path) -> None:
    with launched(two, tmp_path / "run", *way, DIGITS, "--epochs", "10000", "--log-every", "1") as process:
        wait_for_step(tmp_path / "run", 3)
        process.send_signal(signal.SIGINT)
        code, out, err = end(process)
    assert code == 75, f"{out}\n{err}"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (HOROVODRUN, "ended with code 255 and no message: over ssh, that is a rank killed by a signal"),
        # Rank 0 may miss rank 1, and abort, before mpirun notices.
        (MPIRUN, r"was (killed by signal 9 \(SIGKILL\)|lost: it ended)"),
    ],
    ids=["horovodrun", "mpirun"],
)
def test_a_rank_killed_on_another_host_is_named(way: list[str], words: str, two: list[Host], tmp_path: Path) -> None:
    with launched(two, tmp_path / "run", *way, DIGITS, "--epochs", "10000", "--log-every", "1") as process:
        wait_for_step(tmp_path / "run", 3)
        (second,) = ranks(two[1])
        second.kill()
        code, out, err = end(process)
    assert code == 1, f"{out}\n{err}"
    assert re.search(f"hvdtrain: error: rank 1 on h1 {words}", err), f"{out}\n{err}"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (HOROVODRUN, "ended with code 255 and no message: over ssh, that is a"),
        (MPIRUN, "was lost: the connection to the host failed"),
    ],
    ids=["horovodrun", "mpirun"],
)
def test_a_host_that_loses_its_power_is_named(way: list[str], words: str, tmp_path: Path) -> None:
    """mpirun itself may end with code 0 then."""
    options = [*way, DIGITS, "--epochs", "10000", "--log-every", "1"]
    with cluster(2) as hosts, launched(hosts, tmp_path / "run", *options) as process:
        wait_for_step(tmp_path / "run", 3)
        hosts[1].down()
        code, out, err = end(process)
    assert code == 1, f"{out}\n{err}"
    assert re.search(f"hvdtrain: error: rank 1 on h1 {words}", err), f"{out}\n{err}"


@pytest.mark.parametrize("way", [HOROVODRUN, MPIRUN], ids=" ".join)
def test_nothing_is_left_on_any_host_when_launch_is_killed(way: list[str], two: list[Host], tmp_path: Path) -> None:
    with launched(two, tmp_path / "run", *way, DIGITS, "--epochs", "10000", "--log-every", "1") as process:
        wait_for_step(tmp_path / "run", 3)
        process.kill()
        end(process)
