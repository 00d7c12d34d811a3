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

from hvdtrain.launch.report import SSH_FAILURE_CODE, JobReport, ProcessKey, message_sender
from hvdtrain.launch.screen import Screen
from hvdtrain.system.messages import message_prefix
from hvdtrain.system.network import build_ssh_command
from hvdtrain.system.ssh import Ssh

REMOTE_KILL_SECONDS = 10  # to end ranks on another host, at most


HostLister = Callable[[], Collection[str]]  # names of hosts


@dataclass
class Job:
    """A launcher that runs, under its guard."""

    guard: subprocess.Popen[bytes]
    keep_alive: contextlib.ExitStack  # closes the pipe that keeps it alive
    report: JobReport
    ssh: Ssh
    grace: float
    mark: str  # begins the messages of its ranks
    launcher_name: str = ""  # its name
    screen: Screen = field(default_factory=Screen)
    stop_signal: int | None = None  # the signal by which the user asked for a stop
    stop_requested_at: float = 0.0  # when, by the monotonic clock
    stopped_before_start: bool = False  # for any rank to be asked
    signalled: set[ProcessKey] = field(default_factory=set)  # that were asked to
    stop_deadline: float | None = None  # of the stop, by the monotonic clock
    terminated: bool = False  # by us, before its time
    is_elastic: bool = False
    list_hosts: HostLister | None = None  # the hosts that horovodrun was told of last, in an elastic run
    known_hosts: set[str] = field(default_factory=set)  # all that it was told of, also those that have left
    ssh_calls: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)  # of ssh, with the host


def start_job(line: Sequence[str], environ: Mapping[str, str], report: JobReport, ssh: Ssh, grace: float) -> Job:
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
    return Job(guard, closing, report, ssh, grace, message_prefix(environ))


def terminate_job(job: Job) -> None:
    """Tell the guard to end everything now."""
    job.terminated = True
    job.keep_alive.close()


def kill_remote_ranks(job: Job) -> None:
    """Kill the ranks on other hosts that have not said that they end: the guard reaches only this host's.

    srun ends its ranks when it is ended, and Slurm does if it cannot.
    """
    if job.launcher_name == "srun":
        return
    said = set(job.report.finished) | {message["rank"] for message in job.report.failures}
    here = socket.gethostname()
    # Of an elastic run's earlier ranks the processes are gone, and their numbers may be others'.
    known = job.report.running if job.is_elastic else set(job.report.started)
    left = [rank for rank in sorted(known - said) if job.report.started[rank].get("host") != here]
    signal_ranks(job, "KILL", left)
    deadline = time.monotonic() + REMOTE_KILL_SECONDS
    for _, process in job.ssh_calls:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def signal_ranks(job: Job, name: str, ranks: Sequence[int]) -> None:
    """Send a signal to ranks: directly on this host, by one ssh, that is not waited for, for each other host.

    Under srun it goes to all ranks, as SIGUSR1, which is the one of those asking for a stop that srun hands on.
    """
    if job.launcher_name == "srun":
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(job.guard.pid).children():
                child.send_signal(signal.SIGUSR1)
        return
    remote: dict[str, list[str]] = {}
    for rank in ranks:
        told = job.report.started[rank]
        if name == "USR1" and message_sender(told) in job.signalled:
            continue
        job.signalled.add(message_sender(told))
        # A supervisor hears of a stop also while it has no worker.
        pid = told["supervisor"] if name == "USR1" and "supervisor" in told else told["pid"]
        if told.get("host") == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[f"SIG{name}"])
        else:
            remote.setdefault(job.report.reachable_host(rank), []).append(str(pid))
    for host, pids in remote.items():
        process = subprocess.Popen(
            build_ssh_command(host, ["kill", f"-{name}", *pids], job.ssh.ssh_arguments()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A rank that is already gone is no error.
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        job.ssh_calls.append((host, process))


def pop_unreachable_hosts(job: Job) -> list[str]:
    """The hosts that could not be reached, each told once; nobody needs them where all is being ended."""
    failed = [call for call in job.ssh_calls if call[1].poll() == SSH_FAILURE_CODE and not job.terminated]
    job.ssh_calls = [call for call in job.ssh_calls if call not in failed]
    return [host for host, _ in failed]
