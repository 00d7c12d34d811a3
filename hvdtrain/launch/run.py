"""Runs a job: the launcher's output to the screen, signals to the ranks, and an exit code at the end.

A job goes through these states (fields of `Job`; a signal is SIGINT, SIGTERM, SIGHUP or SIGUSR1):

    start_job
        |
        v
    STARTING --- signal: there is no rank to ask (stopped_before_start) ------------------.
        | a rank reports `started`                                                          |
        v                                                                                   |
    RUNNING ---- signal, and a rank has failed already -------------------------------------+
        |  |                                                                                |
        |  | signal: ranks are asked to save (stop_signal, stop_deadline = now + grace)     |
        |  v                                                                                |
        | STOPPING --- another signal, more than a second later; or stop_deadline ----------+
        |  |                                                                                |
        v  v                                                                                v
    FINISHED: all ranks have reported `finished` --- signal, or 10 s without end ------> TERMINATING (terminated):
        |                                                                     the guard ends the launcher, ssh the ranks
        v                                                                                   |  on other hosts
    ENDED: the guard has ended and its output is shown  <-----------------------------------'
        |
        v
    JobResult: the exit code (hvdtrain.launch.outcome), and whether it is final

In an elastic run ranks start and finish again and again; its newest generation counts.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from typing import NamedTuple

from hvdtrain.launch.elastic_program import note_outlived_failures, note_worker_end, number_worker, outlived_at
from hvdtrain.launch.job import (
    Job,
    JobSpec,
    kill_remote_ranks,
    pop_unreachable_hosts,
    signal_ranks,
    start_job,
    terminate_job,
)
from hvdtrain.launch.outcome import choose_outcome_rules, describe_outlived_failure
from hvdtrain.launch.output import SHELL_END_TEXT, OutputLine, OutputParser, extract_message
from hvdtrain.launch.signals import catch_stop_signals
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.system.messages import RankFailed, RankFinished, RankMessage, RankProgress, RankReport, RankStarted
from hvdtrain.system.signals import SAME_STOP_SECONDS, SignalInbox

READ_BYTES = 1 << 20  # of the launcher's output at a time


class JobResult(NamedTuple):
    """How a job ended."""

    exit_code: int
    is_final: bool  # the user's stop, or a recipe's failed rank: the job must not be started again
    reason: str = ""  # what was printed about its end, if anything


def run_job(spec: JobSpec, inbox: SignalInbox | None = None) -> JobResult:
    """Run a job until it ends, and show what it prints.

    The first signal asks rank 0 (of an elastic run, all ranks) to stop and save; another one, more than a second later,
    or the end of the grace, ends all. Whatever happens, also if this process is killed, nothing started here outlives
    it by more than seconds.

    Args:
        spec: what to run.
        inbox: signals that the caller catches; those that come while this cleans up are left in it. None: they are
            caught here.
    """
    with contextlib.nullcontext(inbox) if inbox is not None else catch_stop_signals() as signals:
        job = start_job(spec)
        with job.guard:
            try:
                watch_job(job, signals)
            finally:
                job.screen.close()
                job.keep_alive.close()
                job.guard.wait()
                kill_remote_ranks(job)
    return conclude_job(job)


def conclude_job(job: Job) -> JobResult:
    """Print why the job ended, if that is worth a line, and return its result."""
    report, failed = job.report, bool(job.report.failures)
    determine = choose_outcome_rules(is_elastic=job.spec.is_elastic, is_program=job.spec.is_program)
    code, text = determine(report, job.spec.launcher.name, job.guard.returncode, job.stop_signal)
    has_finished = report.all_finished_at is not None
    if job.terminated and has_finished and not failed:
        text = ""  # whatever the launcher was waiting for does not matter
    # What rank 0 has saved is saved, even if the others had to be ended.
    has_saved = has_finished if job.spec.is_elastic else report.finished.get(0) == EXIT_REQUEUE
    has_saved |= job.spec.is_program and code == EXIT_REQUEUE
    if job.stop_signal == signal.SIGUSR1 and job.stopped_before_start:
        code, text = EXIT_REQUEUE, "no rank had started: there was nothing to save"
    elif job.terminated and job.stop_signal and not has_saved:
        code, text = 128 + job.stop_signal, text if failed else ""
    else:
        for line in report.pop_due_lines(last=True):
            job.screen.print_line(line)
    if text:
        job.screen.print_note(text)
    # A program that failed may well end otherwise when it is started again; a recipe is started again if it was lost.
    return JobResult(code, bool(job.stop_signal or (failed and not job.spec.is_program)), text)


def watch_job(job: Job, inbox: SignalInbox) -> None:
    """Show what comes and act on signals until the guard has ended and all its output is shown."""
    output = job.spec.launcher.output
    streams = [(job.guard.stdout, OutputParser("stdout", output)), (job.guard.stderr, OutputParser("stderr", output))]
    with selectors.DefaultSelector() as selector:
        selector.register(inbox, selectors.EVENT_READ)
        for pipe, parser in streams:
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, parser)
        while job.guard.poll() is None:
            for key, _ in selector.select(seconds_until_due(job)):
                if key.data is None:
                    inbox.clear_wakeups()
                elif not handle_output(job, key.fd, key.data):
                    selector.unregister(key.fileobj)
            while inbox.received:
                handle_job_signal(job, inbox.received.popleft())
            handle_due_events(job)
        for pipe, parser in streams:
            while pipe is not None and handle_output(job, pipe.fileno(), parser):
                pass
            for line in parser.parse_bytes(b""):
                handle_line(job, line)


def handle_due_events(job: Job) -> None:
    """End a job whose time is over, and print what is due."""
    now = time.monotonic()
    if job.stop_deadline is not None and now >= job.stop_deadline and not job.terminated:
        job.screen.print_note(f"the ranks have not ended within {job.spec.grace:g} s: ending them")
        terminate_job(job)
    if (over := job.report.launcher_deadline()) is not None and now >= over and not job.terminated:
        job.screen.print_note(f"all ranks have finished, and {job.spec.launcher.name} waits for others: ending it")
        terminate_job(job)
    for host in pop_unreachable_hosts(job):
        job.screen.print_note(f"{host} cannot be reached by ssh: its ranks do not receive the stop")
    for line in job.report.pop_due_lines():
        job.screen.print_line(line)
    note_outlived_failures(job)
    due = job.report.standstill_due
    if due is not None and now >= due and (text := job.report.summarize_standstill()):
        job.screen.print_note(text)


def handle_output(job: Job, fd: int, parser: OutputParser) -> bool:
    """Handle what there is to read; return False if there is nothing, now or at the end."""
    try:
        data = os.read(fd, READ_BYTES)
    except BlockingIOError:
        return False
    if data:
        plain, rest = parser.convert_plain_lines(data) if job.screen.can_print_plain(parser.stream) else ("", data)
        job.screen.print_plain(plain, parser.stream)
        for line in parser.parse_bytes(rest) if rest else ():
            handle_line(job, line)
    return bool(data)


def handle_line(job: Job, line: OutputLine) -> None:
    """Show a line, hold it back, or handle the message in it."""
    message = extract_message(line, job.mark, elastic=job.spec.is_elastic)
    if message is not None and is_of_this_launch(job, message):
        if isinstance(message, RankProgress):
            job.screen.update_progress(message)
        elif isinstance(message, RankReport):
            job.screen.write_line(message.text, "stdout")
        # What ranks report of their end once we end them is not news.
        elif not job.terminated:
            if job.spec.is_program:
                handle_program_message(job, message)
            else:
                handle_message(job, message)
        return
    if line.rank is None:
        job.report.hold_line(line)
    elif not is_shell_noise(job, line):
        job.report.note_lost_peer(line)
        job.screen.print_line(line)


def is_shell_noise(job: Job, line: OutputLine) -> bool:
    """Return whether a rank's shell reports the end of a rank that the launcher ended because another one failed."""
    if (line.stream, line.text) != ("stderr", SHELL_END_TEXT):
        return False
    return bool(job.stop_signal or job.report.failures or job.report.rank_exits())


def is_of_this_launch(job: Job, message: RankMessage) -> bool:
    """Return whether a message is from a rank, and about a host, that this launch has started."""
    if isinstance(message, RankProgress):
        return True
    if job.report.hosts and message.rank >= len(job.report.hosts):
        return False
    if job.spec.list_hosts is None or not isinstance(message, RankStarted) or message.reach is None:
        return True
    job.known_hosts.update(job.spec.list_hosts())
    return message.reach in job.known_hosts


def handle_message(job: Job, message: RankMessage) -> None:
    """Add a rank's message to the report, and ask a rank to stop that started after the others were asked."""
    elastic = job.spec.is_elastic
    if isinstance(message, RankFailed) and elastic and job.report.is_from_newcomer(message):
        outlived = [message]
    else:
        before = job.report.failures
        job.report.add_message(message)
        outlived = [failure for failure in before if failure not in job.report.failures]
    for failure in outlived:
        job.screen.print_note(describe_outlived_failure(failure))
    if elastic and job.stop_signal and isinstance(message, RankStarted):
        signal_ranks(job, "USR1", [message.rank])


def handle_program_message(job: Job, message: RankMessage) -> None:
    """Add a message of a program's rank to the report, and pass a stop on to a rank that started after it."""
    elastic = job.spec.is_elastic
    message = number_worker(job, message) if elastic else message
    job.report.add_message(message)
    if elastic:
        note_worker_end(job, message)
    if job.stop_signal and isinstance(message, RankStarted):
        signal_ranks(job, stop_signal_name(job), [message.rank])
    if isinstance(message, RankFinished) and message.code == EXIT_REQUEUE and job.stop_deadline is None:
        job.stop_deadline = time.monotonic() + job.spec.grace  # for the other ranks to be done as well


def handle_job_signal(job: Job, number: int) -> None:
    """Ask for a graceful stop the first time, if there is a rank to ask; otherwise end everything.

    Signals within SAME_STOP_SECONDS after the first are the same stop.
    """
    now = time.monotonic()
    if job.terminated or (job.stop_signal is not None and now - job.stop_requested_at <= SAME_STOP_SECONDS):
        return
    if job.report.launcher_deadline() is not None:  # no rank is left to ask
        terminate_job(job)
        return
    elastic = job.spec.is_elastic
    ranks = find_ranks_to_ask(job)
    if job.stop_signal is None and ranks and (elastic or not job.report.failures):
        job.stop_signal, job.stop_requested_at = number, now
        job.stop_deadline = now + job.spec.grace
        job.screen.print_note(describe_stop(job))
        if job.spec.is_program or elastic or 0 not in job.report.finished:
            signal_ranks(job, stop_signal_name(job), ranks)
        return
    job.stopped_before_start = job.stop_signal is None and not ranks and not job.report.failures
    job.stop_signal = number
    terminate_job(job)


def find_ranks_to_ask(job: Job) -> list[int]:
    """Return the ranks that a stop is for."""
    if job.spec.is_program:
        return sorted(set(job.report.started) - job.report.ended_ranks())
    # In an elastic run rank 0 may have left or died, and a rank that has failed is replaced.
    return sorted(job.report.running) if job.spec.is_elastic else [0] if 0 in job.report.started else []


def stop_signal_name(job: Job) -> str:
    """Return the signal by which ranks are asked to stop: a program gets the user's own."""
    if job.spec.is_program and job.stop_signal is not None:
        return signal.Signals(job.stop_signal).name.removeprefix("SIG")
    return "USR1" if job.spec.is_elastic else "TERM"  # in an elastic run SIGTERM is for one rank alone


def describe_stop(job: Job) -> str:
    """Return the line about a stop by the user."""
    if job.spec.is_program:
        name, launcher = f"SIG{stop_signal_name(job)}", job.spec.launcher
        if launcher.batch_system is not None and job.spec.announce_stop is None:  # its ranks know no other
            name = signal.Signals(launcher.relayed_stop_signal).name
        what = f"{name} goes to the program of each rank, which has {job.spec.grace:g} s to end"
    else:
        what = "ranks finish the step and save"
    return f"stopping: {what}; press Ctrl-C again to end at once"


def seconds_until_due(job: Job) -> float | None:
    """Return how long to wait for output or a signal before something else is due; None if nothing is."""
    ends = [] if job.terminated else [job.stop_deadline, job.report.launcher_deadline()]
    others = [job.report.next_due_at(), job.report.standstill_due, outlived_at(job)]
    times = [at for at in (*ends, *others) if at is not None]
    return max(0.0, min(times) - time.monotonic()) if times else None
