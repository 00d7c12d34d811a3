"""Runs the launcher: its output to the screen, signals to the ranks, and an exit code at the end."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.launch.hosts import Host, host_of_each_rank
from hvdtrain.launch.job import Job, Listed, end, end_remote_ranks, signal_ranks, start, unreached
from hvdtrain.launch.output import PREFIX, SRUN_PREFIX, Line, Lines, take_message
from hvdtrain.launch.report import Report, elastic_outcome, failure_text, outcome
from hvdtrain.launch.signals import Caught, signals
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.system.signals import SAME_STOP
from hvdtrain.system.ssh import AS_CONFIGURED, Ssh


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


def wait_seconds(job: Job) -> float | None:
    """How long to wait for output or a signal before something else is due."""
    ends = [] if job.ended else [job.deadline, job.report.over_at()]
    times = [at for at in (*ends, job.report.next_due(), job.report.standing_due) if at is not None]
    return max(0.0, min(times) - time.monotonic()) if times else None
