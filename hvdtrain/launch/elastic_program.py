"""Workers of an elastic program: horovodrun starts one in each slot, and another one where one has failed.

What is known of a program's worker is its process, not its rank, which changes without notice. So launch gives each
worker a number of its own, under which the job's report keeps it. A failure counts once the job has ended by it: when
another worker has finished well after it, or still runs some seconds later, the others have outlived it.
"""

from __future__ import annotations

import time
from dataclasses import replace

from hvdtrain.launch.job import Job
from hvdtrain.launch.outcome import describe_outlived_failure
from hvdtrain.launch.report import message_sender
from hvdtrain.system.limits import ProgramLimits
from hvdtrain.system.messages import RankFailed, RankFinished, RankMessage, RankStarted


def number_worker(job: Job, message: RankMessage) -> RankMessage:
    """Return a worker's message with the number of the worker in place of its rank."""
    if not isinstance(message, RankStarted | RankFailed | RankFinished):
        return message
    number = job.worker_numbers.setdefault(message_sender(message), len(job.worker_numbers))
    return replace(message, rank=number)


def note_worker_end(job: Job, message: RankMessage) -> None:
    """Note that a worker has failed, or that the others have outlived those that failed before."""
    if isinstance(message, RankFailed):
        job.report.running.discard(message.rank)
        job.failed_at[message.rank] = time.monotonic()
    elif isinstance(message, RankFinished) and message.code == 0:
        job.failed_at = dict.fromkeys(job.failed_at, 0.0)
        note_outlived_failures(job)


def note_outlived_failures(job: Job) -> None:
    """Print the failures that the other workers have outlived, and forget them."""
    due = outlived_at(job)
    if due is None or time.monotonic() < due:
        return
    now = time.monotonic()
    over = {rank for rank, at in job.failed_at.items() if now >= at + ProgramLimits.outlived}
    for failure in [failure for failure in job.report.failures if failure.rank in over]:
        job.report.failures.remove(failure)
        job.screen.print_note(describe_outlived_failure(failure))
    job.failed_at = {rank: at for rank, at in job.failed_at.items() if rank not in over}


def outlived_at(job: Job) -> float | None:
    """Return the monotonic time at which the next failure is outlived; None if none is, or no worker runs."""
    if not job.failed_at or not (job.report.running or min(job.failed_at.values()) == 0.0):
        return None
    return min(job.failed_at.values()) + ProgramLimits.outlived
