"""Runs the launcher: its output to the screen, signals to the ranks, and an exit code at the end."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hvdtrain.errors import EXIT_REQUEUE
from hvdtrain.launch.hosts import Host, host_of_each_rank
from hvdtrain.launch.output import PREFIX, SRUN_PREFIX, Line, Lines, take_message
from hvdtrain.launch.report import SSH_FAILED, Process, Report, elastic_outcome, failure_text, outcome, process_of
from hvdtrain.launch.screen import Screen
from hvdtrain.launch.signals import Caught, signals
from hvdtrain.launch.ssh import AS_CONFIGURED, Ssh
from hvdtrain.messages import message_mark
from hvdtrain.network import ssh_command
from hvdtrain.signals import SAME_STOP

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


def run(
    line: Sequence[str],
    environ: Mapping[str, str],
    hosts: Sequence[Host],
    *,
    ssh: Ssh = AS_CONFIGURED,
    grace: float = 30.0,
    elastic: bool = False,
    listed: Listed | None = None,
    caught: Caught | None = None,
) -> tuple[int, bool]:
    """Run a launcher's command line in an environment until it ends.

    Returns the exit code, and whether somebody has said why: a rank that failed, or the user who asked for a stop.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks rank 0 to stop and save; another one, more than a second later, or
    the end of the grace, ends all.
    caught: signals that the caller has caught; what comes while this cleans up is left in it.
    Whatever happens, also if this process is killed, nothing started here outlives it by more than seconds.
    """
    with contextlib.nullcontext(caught) if caught else signals() as (received, woken):
        job = start(line, environ, Report(host_of_each_rank(hosts)), ssh, grace)
        job.launcher, job.elastic, job.listed = Path(line[0]).name, elastic, listed
        with job.guard:
            try:
                attend(job, received, woken)
            finally:
                job.screen.close()
                job.life.close()
                job.guard.wait()
                end_remote_ranks(job)
    judge = elastic_outcome if elastic else outcome
    verdict, text = judge(job.report, job.launcher, job.guard.returncode, job.asked)
    if job.ended and job.report.over_since is not None:  # nothing of what the launcher was waiting for matters
        text = text if job.report.failed else ""
    # What rank 0 has saved is saved, even if the others had to be ended.
    saved = job.report.over_since is not None if elastic else job.report.finished.get(0) == EXIT_REQUEUE
    if job.asked == signal.SIGUSR1 and job.too_early:
        verdict, text = EXIT_REQUEUE, "no rank had started: there was nothing to save"
    elif job.ended and job.asked and not saved:
        verdict, text = 128 + job.asked, text if job.report.failed else ""
    else:
        for held in job.report.due(last=True):
            job.screen.line(held)
    if text:
        job.screen.note(text)
    return verdict, bool(job.asked or job.report.failed)


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


def attend(job: Job, received: list[int], woken: int) -> None:
    """Show what comes and act on signals until the guard has ended and all its output is shown."""
    prefix = SRUN_PREFIX if job.launcher == "srun" else PREFIX
    streams = [(job.guard.stdout, Lines("stdout", prefix)), (job.guard.stderr, Lines("stderr", prefix))]
    with selectors.DefaultSelector() as selector:
        selector.register(woken, selectors.EVENT_READ)
        for pipe, lines in streams:
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, lines)
        while job.guard.poll() is None:
            for key, _ in selector.select(wait_seconds(job)):
                if key.data is None:
                    os.read(woken, 4096)
                elif not show(job, key.fd, key.data):
                    selector.unregister(key.fileobj)
            while received:
                on_signal(job, received.pop(0))
            if job.deadline is not None and time.monotonic() >= job.deadline and not job.ended:
                job.screen.note(f"the ranks have not ended within {job.grace:g} s: ending them")
                end(job)
            if (over := job.report.over_at()) is not None and time.monotonic() >= over and not job.ended:
                job.screen.note(f"all ranks have finished, and {job.launcher} waits for others: ending it")
                end(job)
            for host in unreached(job):
                job.screen.note(f"{host} cannot be reached by ssh: its ranks do not hear of the stop")
            for line in job.report.due():
                job.screen.line(line)
            standing = job.report.standing_due
            if standing is not None and time.monotonic() >= standing and (text := job.report.standstill()):
                job.screen.note(text)
        for pipe, lines in streams:
            while pipe is not None and show(job, pipe.fileno(), lines):
                pass
            for line in lines.feed(b""):
                handle(job, line)


def show(job: Job, fd: int, lines: Lines) -> bool:
    """Handle what there is to read; False if there is nothing, now or for good."""
    try:
        data = os.read(fd, 1 << 20)
    except BlockingIOError:
        return False
    if data:
        plain, rest = lines.take_plain(data) if job.screen.takes_plain(lines.stream) else ("", data)
        job.screen.plain(plain, lines.stream)
        for line in lines.feed(rest) if rest else ():
            handle(job, line)
    return bool(data)


def handle(job: Job, line: Line) -> None:
    """Show a line, hold it back, or take the message out of it."""
    message = take_message(line, job.mark, elastic=job.elastic)
    if message is not None and is_of_this_launch(job, message):
        if message["kind"] == "progress":
            job.screen.progress(message)
        # What ranks say of their end once we end them is no news.
        elif not job.ended:
            take(job, message)
        return
    if line.rank is None:
        job.report.hold(line)
    else:
        job.report.hear(line)
        job.screen.line(line)


def is_of_this_launch(job: Job, message: dict[str, Any]) -> bool:
    """Whether a message is from a rank, and about a host, that this launch has started."""
    if job.report.hosts and message.get("rank", 0) >= len(job.report.hosts):
        return False
    if job.listed is None or "reach" not in message:
        return True
    job.known.update(job.listed())
    return message["reach"] in job.known


def take(job: Job, message: dict[str, Any]) -> None:
    """Note a rank's message, and ask a rank to stop that was not there when all were."""
    if job.elastic and job.report.newcomer(message):
        outlived = [message]
    else:
        before = job.report.failed
        job.report.take(message)
        outlived = [failure for failure in before if failure not in job.report.failed]
    for failure in outlived:
        job.screen.note(f"a worker on {failure.get('host')} failed, the others go on: {failure_text(failure)}")
    if job.elastic and job.asked and message["kind"] == "started":
        signal_ranks(job, "USR1", [message["rank"]])


def on_signal(job: Job, number: int) -> None:
    """Ask for a graceful stop the first time, if there is a rank to ask; otherwise end everything.

    Those within SAME_STOP seconds after the first are the same stop.
    """
    now = time.monotonic()
    if job.ended or (job.asked is not None and now - job.asked_at <= SAME_STOP):
        return
    if job.report.over_at() is not None:  # nobody is left to ask
        end(job)
        return
    # In an elastic run rank 0 may have left or died, and a rank that has failed is replaced.
    ranks = sorted(job.report.running) if job.elastic else [0] if 0 in job.report.started else []
    if job.asked is None and ranks and (job.elastic or not job.report.failed):
        job.asked, job.asked_at = number, now
        job.deadline = now + job.grace
        job.screen.note("stopping: ranks finish the step and save; press Ctrl-C again to end at once")
        if job.elastic or 0 not in job.report.finished:
            # In an elastic run SIGTERM means one rank alone.
            signal_ranks(job, "USR1" if job.elastic else "TERM", ranks)
        return
    job.too_early = job.asked is None and not ranks and not job.report.failed
    job.asked = number
    end(job)


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


def wait_seconds(job: Job) -> float | None:
    """How long to wait for output or a signal before something else is due."""
    ends = [] if job.ended else [job.deadline, job.report.over_at()]
    times = [at for at in (*ends, job.report.next_due(), job.report.standing_due) if at is not None]
    return max(0.0, min(times) - time.monotonic()) if times else None
