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

from hvdtrain.launch.hosts import Host, hosts_by_rank
from hvdtrain.launch.job import (
    HostLister,
    Job,
    kill_remote_ranks,
    pop_unreachable_hosts,
    signal_ranks,
    start_job,
    terminate_job,
)
from hvdtrain.launch.output import LINE_PREFIX, SRUN_PREFIX, OutputLine, OutputParser, extract_message
from hvdtrain.launch.report import JobReport, determine_elastic_outcome, determine_outcome, failure_text
from hvdtrain.launch.signals import SignalInbox, catch_stop_signals
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.system.signals import SAME_STOP_SECONDS
from hvdtrain.system.ssh import DEFAULT_SSH, Ssh


def run_launcher(
    line: Sequence[str],
    environ: Mapping[str, str],
    hosts: Sequence[Host],
    *,
    ssh: Ssh = DEFAULT_SSH,
    grace: float = 30.0,
    elastic: bool = False,
    listed: HostLister | None = None,
    caught: SignalInbox | None = None,
) -> tuple[int, bool]:
    """Run a launcher's command line in an environment until it ends.

    Returns the exit code, and whether somebody has said why: a rank that failed, or the user who asked for a stop.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks rank 0 to stop and save; another one, more than a second later, or
    the end of the grace, ends all.
    caught: signals that the caller has caught; what comes while this cleans up is left in it.
    Whatever happens, also if this process is killed, nothing started here outlives it by more than seconds.
    """
    with contextlib.nullcontext(caught) if caught else catch_stop_signals() as (received, woken):
        job = start_job(line, environ, JobReport(hosts_by_rank(hosts)), ssh, grace)
        job.launcher_name, job.is_elastic, job.list_hosts = Path(line[0]).name, elastic, listed
        with job.guard:
            try:
                watch_job(job, received, woken)
            finally:
                job.screen.close()
                job.keep_alive.close()
                job.guard.wait()
                kill_remote_ranks(job)
    judge = determine_elastic_outcome if elastic else determine_outcome
    verdict, text = judge(job.report, job.launcher_name, job.guard.returncode, job.stop_signal)
    if (
        job.terminated and job.report.all_finished_at is not None
    ):  # nothing of what the launcher was waiting for matters
        text = text if job.report.failures else ""
    # What rank 0 has saved is saved, even if the others had to be ended.
    saved = job.report.all_finished_at is not None if elastic else job.report.finished.get(0) == EXIT_REQUEUE
    if job.stop_signal == signal.SIGUSR1 and job.stopped_before_start:
        verdict, text = EXIT_REQUEUE, "no rank had started: there was nothing to save"
    elif job.terminated and job.stop_signal and not saved:
        verdict, text = 128 + job.stop_signal, text if job.report.failures else ""
    else:
        for held in job.report.pop_due_lines(last=True):
            job.screen.print_line(held)
    if text:
        job.screen.print_note(text)
    return verdict, bool(job.stop_signal or job.report.failures)


def watch_job(job: Job, received: list[int], woken: int) -> None:
    """Show what comes and act on signals until the guard has ended and all its output is shown."""
    prefix = SRUN_PREFIX if job.launcher_name == "srun" else LINE_PREFIX
    streams = [(job.guard.stdout, OutputParser("stdout", prefix)), (job.guard.stderr, OutputParser("stderr", prefix))]
    with selectors.DefaultSelector() as selector:
        selector.register(woken, selectors.EVENT_READ)
        for pipe, lines in streams:
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, lines)
        while job.guard.poll() is None:
            for key, _ in selector.select(seconds_until_due(job)):
                if key.data is None:
                    os.read(woken, 4096)
                elif not handle_output(job, key.fd, key.data):
                    selector.unregister(key.fileobj)
            while received:
                handle_job_signal(job, received.pop(0))
            if job.stop_deadline is not None and time.monotonic() >= job.stop_deadline and not job.terminated:
                job.screen.print_note(f"the ranks have not ended within {job.grace:g} s: ending them")
                terminate_job(job)
            if (over := job.report.launcher_deadline()) is not None and time.monotonic() >= over and not job.terminated:
                job.screen.print_note(f"all ranks have finished, and {job.launcher_name} waits for others: ending it")
                terminate_job(job)
            for host in pop_unreachable_hosts(job):
                job.screen.print_note(f"{host} cannot be reached by ssh: its ranks do not hear of the stop")
            for line in job.report.pop_due_lines():
                job.screen.print_line(line)
            standing = job.report.standstill_due
            if standing is not None and time.monotonic() >= standing and (text := job.report.summarize_standstill()):
                job.screen.print_note(text)
        for pipe, lines in streams:
            while pipe is not None and handle_output(job, pipe.fileno(), lines):
                pass
            for line in lines.parse_bytes(b""):
                handle_line(job, line)


def handle_output(job: Job, fd: int, lines: OutputParser) -> bool:
    """Handle what there is to read; False if there is nothing, now or for good."""
    try:
        data = os.read(fd, 1 << 20)
    except BlockingIOError:
        return False
    if data:
        plain, rest = lines.convert_plain_lines(data) if job.screen.can_print_plain(lines.stream) else ("", data)
        job.screen.print_plain(plain, lines.stream)
        for line in lines.parse_bytes(rest) if rest else ():
            handle_line(job, line)
    return bool(data)


def handle_line(job: Job, line: OutputLine) -> None:
    """Show a line, hold it back, or take the message out of it."""
    message = extract_message(line, job.mark, elastic=job.is_elastic)
    if message is not None and is_of_this_launch(job, message):
        if message["kind"] == "progress":
            job.screen.update_progress(message)
        # What ranks say of their end once we end them is no news.
        elif not job.terminated:
            handle_message(job, message)
        return
    if line.rank is None:
        job.report.hold_line(line)
    else:
        job.report.note_lost_peer(line)
        job.screen.print_line(line)


def is_of_this_launch(job: Job, message: dict[str, Any]) -> bool:
    """Whether a message is from a rank, and about a host, that this launch has started."""
    if job.report.hosts and message.get("rank", 0) >= len(job.report.hosts):
        return False
    if job.list_hosts is None or "reach" not in message:
        return True
    job.known_hosts.update(job.list_hosts())
    return message["reach"] in job.known_hosts


def handle_message(job: Job, message: dict[str, Any]) -> None:
    """Note a rank's message, and ask a rank to stop that was not there when all were."""
    if job.is_elastic and job.report.is_from_newcomer(message):
        outlived = [message]
    else:
        before = job.report.failures
        job.report.add_message(message)
        outlived = [failure for failure in before if failure not in job.report.failures]
    for failure in outlived:
        job.screen.print_note(f"a worker on {failure.get('host')} failed, the others go on: {failure_text(failure)}")
    if job.is_elastic and job.stop_signal and message["kind"] == "started":
        signal_ranks(job, "USR1", [message["rank"]])


def handle_job_signal(job: Job, number: int) -> None:
    """Ask for a graceful stop the first time, if there is a rank to ask; otherwise end everything.

    Those within SAME_STOP seconds after the first are the same stop.
    """
    now = time.monotonic()
    if job.terminated or (job.stop_signal is not None and now - job.stop_requested_at <= SAME_STOP_SECONDS):
        return
    if job.report.launcher_deadline() is not None:  # nobody is left to ask
        terminate_job(job)
        return
    # In an elastic run rank 0 may have left or died, and a rank that has failed is replaced.
    ranks = sorted(job.report.running) if job.is_elastic else [0] if 0 in job.report.started else []
    if job.stop_signal is None and ranks and (job.is_elastic or not job.report.failures):
        job.stop_signal, job.stop_requested_at = number, now
        job.stop_deadline = now + job.grace
        job.screen.print_note("stopping: ranks finish the step and save; press Ctrl-C again to end at once")
        if job.is_elastic or 0 not in job.report.finished:
            # In an elastic run SIGTERM means one rank alone.
            signal_ranks(job, "USR1" if job.is_elastic else "TERM", ranks)
        return
    job.stopped_before_start = job.stop_signal is None and not ranks and not job.report.failures
    job.stop_signal = number
    terminate_job(job)


def seconds_until_due(job: Job) -> float | None:
    """How long to wait for output or a signal before something else is due."""
    ends = [] if job.terminated else [job.stop_deadline, job.report.launcher_deadline()]
    times = [at for at in (*ends, job.report.next_due_at(), job.report.standstill_due) if at is not None]
    return max(0.0, min(times) - time.monotonic()) if times else None
