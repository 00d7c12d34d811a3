"""`hvdtrain launch` over the real horovodrun and mpirun, with a small script for the ranks."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.ranks.harness import HVDTRAIN, Job
from tests.support.limits import stretch
from tests.support.processes import kill_all
from tests.support.slow_cases import slow

HERE = Path(__file__).parent
LAUNCHERS = [("horovodrun", "gloo"), ("horovodrun", "mpi"), ("mpirun", "mpi")]
# horovodrun over MPI starts its ranks by mpirun.
SLOW_OVER_MPI = [LAUNCHERS[0], *slow(LAUNCHERS[1]), LAUNCHERS[2]]
# What hvdtrain does alike with all of them.
ONE = [LAUNCHERS[0], *slow(*LAUNCHERS[1:])]
NOISE = ["exit with status code", "Terminating remaining", "RuntimeError: Horovod detected", "prterun", "-----"]


class Launched:
    """A launch that runs, and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[str], token: str) -> None:
        self.process = process
        self.token = token
        self.out = ""
        self.err = ""
        self.threads = [threading.Thread(target=self.read, args=[name]) for name in ("out", "err")]
        for thread in self.threads:
            thread.start()

    def read(self, name: str) -> None:
        stream = self.process.stdout if name == "out" else self.process.stderr
        assert stream is not None
        with stream:
            for line in stream:
                setattr(self, name, getattr(self, name) + line)

    def wait_for(self, text: str, seconds: float = 40) -> None:
        until = time.monotonic() + stretch(seconds)
        while text not in self.out + self.err:
            assert time.monotonic() < until and self.process.poll() is None, f"no {text!r} in\n{self.out}{self.err}"
            time.sleep(0.05)

    def wait(self, seconds: float = 50) -> int:
        code = self.process.wait(stretch(seconds))
        for thread in self.threads:
            thread.join(seconds)
        return code

    def running(self) -> list[psutil.Process]:
        """Every process that has inherited this launch's token."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("HVDTRAIN_LAUNCH_TEST") == self.token
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@contextmanager
def launched(
    launcher: str, controller: str, mode: str, grace: float = 30, path: Path | None = None
) -> Iterator[Launched]:
    """Two ranks of fake_rank.py under launch; afterwards nothing of it may run."""
    token = uuid.uuid4().hex
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HVDTRAIN_LAUNCH_TEST": token}
    if path:
        environ["PATH"] = f"{path}{os.pathsep}{environ['PATH']}"
    command = [sys.executable, str(HERE / "fake_launch.py"), launcher, controller, str(grace), "localhost:2", mode]
    process = subprocess.Popen(
        command, env=environ, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    job = Launched(process, token)
    try:
        yield job
        job.wait()
        assert job.running() == []
    finally:
        kill_all(job.running())
        job.wait()


def rank_pids(job: Launched) -> list[int]:
    return [process.pid for process in job.running() if process.cmdline()[1:2] == [str(HERE / "fake_rank.py")]]


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_output_of_successful_ranks_is_labelled_and_exit_code_is_0(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "ok") as job:
        assert job.wait() == 0
    for rank in (0, 1):
        lines = [line for line in job.out.splitlines() if line.startswith(f"[{rank}] ")]
        hello = f"hello from {rank} of 2, umläut, launched=1"
        assert [line[4:] for line in lines] == ["unfinished", "", hello, "sum 2"]
        assert f"[{rank}] error stream {rank}\n" in job.err
    assert "##hvdtrain" not in job.out + job.err


@pytest.mark.parametrize(("launcher", "controller"), SLOW_OVER_MPI)
def test_rank_that_raises_is_named_once_with_its_traceback(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "raise") as job:
        assert job.wait() == 1
    shown = job.err[job.err.index("hvdtrain: error: rank 1 on ") :]
    assert " failed: ValueError: boom\nTraceback (most recent call last):\n" in shown
    assert shown.count("Traceback") == 1
    assert not [noise for noise in NOISE if noise in job.out + job.err]


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_rank_that_is_killed_is_named_with_the_signal(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "kill") as job:
        assert job.wait() == 1
    assert "hvdtrain: error: rank 1 on " in job.err
    assert " was killed by signal 9 (SIGKILL)" in job.err
    assert "failed: HorovodInternalError" not in job.err


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_rank_that_exits_without_a_message_is_named_with_its_code(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "code") as job:
        assert job.wait() == 1
    assert " ended with code 3 and no message" in job.err


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_exit_codes_75_and_2_pass_through(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "requeue") as job:
        assert job.wait() == 75
    assert "error:" not in job.err
    with launched(launcher, controller, "user") as job:
        assert job.wait() == 2
    assert "failed: no such file\n" in job.err


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_carriage_returns_long_lines_and_a_last_line_without_an_end(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "text") as job:
        assert job.wait() == 0
    for rank in (0, 1):
        lines = [line.removeprefix(f"[{rank}] ") for line in job.out.splitlines() if line.startswith(f"[{rank}] ")]
        assert lines[lines.index("one") :] == ["one", "two", "x" * 100_000 + "end", "  indented", "no newline"]


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_invalid_utf8_is_shown_as_replacement_characters(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "bytes") as job:
        assert job.wait() == 0
    assert "[0] bad \N{REPLACEMENT CHARACTER} bytes\n" in job.out


@pytest.mark.parametrize(
    ("launcher", "controller", "number"),
    [
        pytest.param(*way, number, marks=[] if i == j != 1 else pytest.mark.slow)
        for i, way in enumerate(LAUNCHERS)
        for j, number in enumerate([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    ],
)
def test_one_signal_lets_the_ranks_save(launcher: str, controller: str, number: int) -> None:
    with launched(launcher, controller, "wait") as job:
        job.wait_for("[0] sum 2")
        job.process.send_signal(number)
        assert job.wait() == 75
    assert job.err.count("stopping: ranks finish the step and save; press Ctrl-C again to end at once") == 1
    assert "[0] saved" in job.out and "[1] saved" in job.out
    assert "error:" not in job.err


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_a_second_signal_ends_at_once(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "deaf", grace=1000) as job:
        job.wait_for("[1] sum 2")
        job.process.send_signal(signal.SIGINT)
        job.wait_for("stopping:")
        time.sleep(1.1)  # two within a second are one
        job.process.send_signal(signal.SIGINT)
        assert job.wait() == 130
    assert not [noise for noise in NOISE if noise in job.out + job.err]


def test_the_grace_period_ends() -> None:
    with launched("horovodrun", "gloo", "deaf", grace=1) as job:
        job.wait_for("[1] sum 2")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 143
    assert "the ranks have not ended within 1 s" in job.err


@pytest.mark.parametrize(
    ("launcher", "controller", "number", "code"),
    [
        ("horovodrun", "gloo", signal.SIGTERM, 143),
        *slow(
            ("horovodrun", "gloo", signal.SIGUSR1, 75),
            ("mpirun", "mpi", signal.SIGTERM, 143),
            ("mpirun", "mpi", signal.SIGUSR1, 75),
        ),
    ],
)
def test_a_signal_before_the_ranks_have_started_ends_at_once(
    launcher: str, controller: str, number: int, code: int
) -> None:
    """By that of a batch system, ahead of the end of its time, the job is to be run again."""
    with launched(launcher, controller, "early") as job:
        job.wait_for("not started")
        job.process.send_signal(number)
        assert job.wait() == code
    assert "stopping:" not in job.err


@pytest.mark.parametrize(("launcher", "controller"), ONE)
def test_launch_killed_leaves_nothing(launcher: str, controller: str) -> None:
    with launched(launcher, controller, "deaf") as job:
        job.wait_for("[1] sum 2")
        assert len(rank_pids(job)) == 2
        job.process.kill()
        until = time.monotonic() + stretch(15)
        while job.running() and time.monotonic() < until:
            time.sleep(0.1)
        assert job.running() == []


def test_ranks_on_another_host_are_signalled_by_ssh(tmp_path: Path) -> None:
    # The ranks claim to be elsewhere, and this ssh runs its command here.
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\n[ "$1" != -G ] || exit 0\necho "$@" >>{tmp_path}/calls\nshift 6\nexec env "$@"\n')
    ssh.chmod(0o755)
    with launched("mpirun", "mpi", "remote", path=tmp_path) as job:
        job.wait_for("[0] sum 2")
        pids = rank_pids(job)
        job.process.send_signal(signal.SIGINT)
        assert job.wait() == 75
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls in [[f"-o ConnectTimeout=5 -o BatchMode=yes -- localhost kill -TERM {pid}"] for pid in pids]


def test_a_launcher_that_fails_by_itself_is_shown() -> None:
    command = [sys.executable, str(HERE / "fake_launch.py"), "mpirun", "mpi", "30", "localhost:1", "/no/such/program"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=stretch(50))
    assert done.returncode == 1
    assert "Executable: /no/such/program" in done.stderr
    assert "hvdtrain: error: mpirun ended with code " in done.stderr


def test_nothing_secret_is_in_the_list_of_processes(tmp_path: Path) -> None:
    """Ranks on this host have the launcher's whole environment, which horovodrun wrote on command lines."""
    recipe, secret = f"{HERE / 'odd_recipes.py'}:TellsSecret", uuid.uuid4().hex
    shown, own = set(), set()
    line = [*HVDTRAIN, "launch", "-np", "2", recipe, "--run-dir", str(tmp_path / "run"), "--steps", "200"]
    with Job(line, env={"SECRET_OF_TEST": secret, "HVDTRAIN_TEST_STEP_SECONDS": "0.01"}) as job:
        while job.process.poll() is None:
            for process in psutil.process_iter():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    shown.add(" ".join(process.cmdline()))
                    if process.environ().get("HVDTRAIN_TEST_MARK") == job.mark:  # mpirun, of other tests, shows names
                        own.add(" ".join(process.cmdline()))
            time.sleep(0.1)
        done = job.finish()
    assert done.returncode == 0, done.stderr
    assert f"[0] secret {secret}" in done.stdout and f"[1] secret {secret}" in done.stdout
    assert any("bin/horovodrun" in text for text in shown)
    assert not [text for text in shown if secret in text]
    assert any("bin/horovodrun" in text for text in own) and not [text for text in own if "HVDTRAIN_" in text]


@pytest.mark.parametrize("seconds", [0, *slow(2, 4), 7])
def test_a_batch_systems_signal_at_any_time(seconds: float, tmp_path: Path) -> None:
    """While launch reads the recipe, while the ranks do, and in training: the job is to be run again."""
    options = ["--run-dir", str(tmp_path / "run"), "--epochs", "1000"]
    with Job([*HVDTRAIN, "launch", "-np", "2", str(HERE / "slow_recipe.py"), *options]) as job:
        status = Path(f"/proc/{job.process.pid}/status")
        caught = 1 << (signal.SIGUSR1 - 1)
        until = time.monotonic() + stretch(20)
        while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & caught:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(seconds)
        job.process.send_signal(signal.SIGUSR1)
        done = job.finish()
    assert done.returncode == 75, done.stderr
