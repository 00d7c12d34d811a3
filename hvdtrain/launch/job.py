"""A job: a launcher that runs under its guard, and the ways to signal and to end its ranks, on any host."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from hvdtrain.launch.hosts import Host, hosts_by_rank
from hvdtrain.launch.launcher import Launcher
from hvdtrain.launch.outcome import SSH_FAILURE_CODE
from hvdtrain.launch.report import JobReport, ProcessKey, message_sender
from hvdtrain.launch.screen import Screen
from hvdtrain.system.limits import LaunchLimits
from hvdtrain.system.messages import message_prefix
from hvdtrain.system.processes import DISCARD, Child, Deadline, ProcessTimeout
from hvdtrain.system.ssh import DEFAULT_SSH, Ssh, build_ssh_command

HostLister = Callable[[], Collection[str]]  # names of hosts


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What to run, and what it takes to watch over it.

    Attributes:
        launcher: whose command line it is.
        command_line: the launcher's.
        environ: what the launcher runs in.
        hosts: in the order in which ranks fill them; empty if that is not known: in an elastic run, and if a batch
            system chooses.
        is_program: ranks run a program that is not a recipe (hvdtrain.launch.program).
        ssh: how other hosts are reached.
        announce_stop: makes the name of a signal known to a program's ranks, whose launcher relays another one.
        grace: seconds that ranks may take to save once they were asked to stop.
        list_hosts: the names of the hosts that horovodrun last got from discovery, for an elastic run; else None.
    """

    launcher: Launcher
    command_line: Sequence[str]
    environ: Mapping[str, str]
    hosts: Sequence[Host] = ()
    is_program: bool = False
    ssh: Ssh = DEFAULT_SSH
    announce_stop: Callable[[str], None] | None = None
    grace: float = 30.0
    list_hosts: HostLister | None = None

    @property
    def is_elastic(self) -> bool:
        """Whether its ranks come and go."""
        return self.list_hosts is not None


@dataclass
class Job:
    """A launcher that runs, under its guard: its state is drawn in `hvdtrain.launch.run`."""

    spec: JobSpec
    guard: subprocess.Popen[bytes]
    report: JobReport
    mark: str  # begins the messages of its ranks
    keep_alive: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closes the guard's pipe
    screen: Screen = field(default_factory=Screen)
    stop_signal: int | None = None  # by which the user asked for a stop
    stop_requested_at: float = 0.0  # monotonic time of it
    stopped_before_start: bool = False  # there was no rank yet to ask
    stop_deadline: float | None = None  # monotonic time at which ranks that were asked to stop are ended
    terminated: bool = False  # by us, before its time
    signalled: set[ProcessKey] = field(default_factory=set)  # processes that were asked to stop
    known_hosts: set[str] = field(default_factory=set)  # all that discovery has named, also those that have left
    worker_numbers: dict[ProcessKey, int] = field(default_factory=dict)  # of an elastic program
    failed_at: dict[int, float] = field(default_factory=dict)  # its workers that failed, with the monotonic time
    ssh_calls: list[tuple[str, Child]] = field(default_factory=list)  # with the host of each


def start_job(spec: JobSpec) -> Job:
    """Start the launcher under a guard, which ends it with all its children when our end of a pipe closes."""
    pipe, life = os.pipe()
    guard = subprocess.Popen(
        [sys.executable, "-m", "hvdtrain.launch.guard", str(pipe), *spec.command_line],
        env=dict(spec.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Ctrl-C in the terminal is for us alone: we decide what the ranks get of it.
        start_new_session=True,
        pass_fds=[pipe],
    )
    os.close(pipe)
    report = JobReport(hosts_by_rank(spec.hosts), spec.launcher.output)
    job = Job(spec, guard, report, message_prefix(spec.environ))
    job.keep_alive.callback(os.close, life)
    return job


def terminate_job(job: Job) -> None:
    """Have the guard end everything now."""
    job.terminated = True
    job.keep_alive.close()


def kill_remote_ranks(job: Job) -> None:
    """Kill the ranks on other hosts that have not reported their end: the guard reaches only this host's.

    A batch system ends its launcher's ranks by itself.
    """
    if job.spec.launcher.batch_system is not None:
        return
    ended = job.report.ended_ranks()
    here = socket.gethostname()
    # Of an elastic run's earlier ranks the processes are gone, and their numbers may be others'.
    known = job.report.running if job.spec.is_elastic else set(job.report.started)
    left = [rank for rank in sorted(known - ended) if job.report.started[rank].host != here]
    signal_ranks(job, "KILL", left)
    deadline = Deadline(LaunchLimits.remote_kill)
    for _, call in job.ssh_calls:
        with contextlib.suppress(ProcessTimeout):
            call.wait_for_exit(deadline)
        call.kill_group()


def signal_ranks(job: Job, name: str, ranks: Sequence[int]) -> None:
    """Send a signal to ranks: directly on this host, by one ssh per other host, which is not waited for.

    A launcher with a batch system gets the signal that it passes on, and all its ranks with it.

    Args:
        job: whose ranks.
        name: USR1, which stops an elastic run, TERM or KILL; for a program any.
        ranks: their numbers.
    """
    if job.spec.launcher.batch_system is not None:
        if job.spec.announce_stop is not None:
            job.spec.announce_stop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(job.guard.pid).children():
                child.send_signal(job.spec.launcher.relayed_stop_signal)
        return
    remote: dict[str, list[str]] = {}
    for rank in ranks:
        started = job.report.started[rank]
        if name == "USR1" and message_sender(started) in job.signalled:
            continue
        job.signalled.add(message_sender(started))
        # A supervisor receives a stop also while it has no worker.
        pid = started.supervisor if name == "USR1" and started.supervisor is not None else started.pid
        if started.host == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[f"SIG{name}"])
        else:
            remote.setdefault(job.report.reachable_host(rank), []).append(str(pid))
    for host, pids in remote.items():
        command = build_ssh_command(host, ["kill", f"-{name}", *pids], job.spec.ssh.ssh_arguments())
        # What it prints does not matter: a rank that is already gone is not an error.
        job.ssh_calls.append((host, Child(command, stdout=DISCARD, stderr=DISCARD)))


def pop_unreachable_hosts(job: Job) -> list[str]:
    """Return the hosts that ssh did not reach, each once; none once everything is being ended."""
    failed = [call for call in job.ssh_calls if call[1].exit_code() == SSH_FAILURE_CODE and not job.terminated]
    job.ssh_calls = [call for call in job.ssh_calls if call not in failed]
    return [host for host, _ in failed]
