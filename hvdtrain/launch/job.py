"""A launcher that runs under its guard, and the ways to signal and to end its ranks, on this host and on others."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from hvdtrain.launch.report import SSH_FAILED, Process, Report, process_of
from hvdtrain.launch.screen import Screen
from hvdtrain.system.messages import message_mark
from hvdtrain.system.network import ssh_command
from hvdtrain.system.ssh import Ssh

SSH_SECONDS = 10  # to end ranks on another host, at most


Listed = Callable[[], Collection[str]]  # names of hosts


@dataclass
class Job:
    """A launcher that runs, under its guard."""

    guard: subprocess.Popen[bytes]
    life: contextlib.ExitStack  # closes the pipe that keeps it alive
    report: Report
    ssh: Ssh
    grace: float
    mark: str  # begins the messages of its ranks
    launcher: str = ""  # its name
    screen: Screen = field(default_factory=Screen)
    asked: int | None = None  # the signal by which the user asked for a stop
    asked_at: float = 0.0  # when, by the monotonic clock
    too_early: bool = False  # for any rank to be asked
    told: set[Process] = field(default_factory=set)  # that were asked to
    deadline: float | None = None  # of the stop, by the monotonic clock
    ended: bool = False  # by us, before its time
    elastic: bool = False
    listed: Listed | None = None  # the hosts that horovodrun was told of last, in an elastic run
    known: set[str] = field(default_factory=set)  # all that it was told of, also those that have left
    calls: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)  # of ssh, with the host


def start(line: Sequence[str], environ: Mapping[str, str], report: Report, ssh: Ssh, grace: float) -> Job:
    """Start the launcher under a guard, which ends it with all its children when our end of a pipe closes."""
    pipe, life = os.pipe()
    guard = subprocess.Popen(
        [sys.executable, "-m", "hvdtrain.launch.guard", str(pipe), *line],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Ctrl-C in the terminal is for us alone: we decide what the ranks hear of it.
        start_new_session=True,
        pass_fds=[pipe],
    )
    os.close(pipe)
    closing = contextlib.ExitStack()
    closing.callback(os.close, life)
    return Job(guard, closing, report, ssh, grace, message_mark(environ))


def end(job: Job) -> None:
    """Tell the guard to end everything now."""
    job.ended = True
    job.life.close()


def end_remote_ranks(job: Job) -> None:
    """Kill the ranks on other hosts that have not said that they end: the guard reaches only this host's.

    srun ends its ranks when it is ended, and Slurm does if it cannot.
    """
    if job.launcher == "srun":
        return
    said = set(job.report.finished) | {message["rank"] for message in job.report.failed}
    here = socket.gethostname()
    # Of an elastic run's earlier ranks the processes are gone, and their numbers may be others'.
    known = job.report.running if job.elastic else set(job.report.started)
    left = [rank for rank in sorted(known - said) if job.report.started[rank].get("host") != here]
    signal_ranks(job, "KILL", left)
    deadline = time.monotonic() + SSH_SECONDS
    for _, process in job.calls:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def signal_ranks(job: Job, name: str, ranks: Sequence[int]) -> None:
    """Send a signal to ranks: directly on this host, by one ssh, that is not waited for, for each other host.

    Under srun it goes to all ranks, as SIGUSR1, which is the one of those asking for a stop that srun hands on.
    """
    if job.launcher == "srun":
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(job.guard.pid).children():
                child.send_signal(signal.SIGUSR1)
        return
    remote: dict[str, list[str]] = {}
    for rank in ranks:
        told = job.report.started[rank]
        if name == "USR1" and process_of(told) in job.told:
            continue
        job.told.add(process_of(told))
        # A supervisor hears of a stop also while it has no worker.
        pid = told["supervisor"] if name == "USR1" and "supervisor" in told else told["pid"]
        if told.get("host") == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[f"SIG{name}"])
        else:
            remote.setdefault(job.report.host(rank), []).append(str(pid))
    for host, pids in remote.items():
        process = subprocess.Popen(
            ssh_command(host, ["kill", f"-{name}", *pids], job.ssh.options()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A rank that is already gone is no error.
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        job.calls.append((host, process))


def unreached(job: Job) -> list[str]:
    """The hosts that could not be reached, each told once; nobody needs them where all is being ended."""
    failed = [call for call in job.calls if call[1].poll() == SSH_FAILED and not job.ended]
    job.calls = [call for call in job.calls if call not in failed]
    return [host for host, _ in failed]
