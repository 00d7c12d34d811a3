"""What a job's report amounts to: which rank failed first, why, and the exit code."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hvdtrain.launch.output import RankExit
from hvdtrain.launch.report import JobReport, is_consequence
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR
from hvdtrain.system.messages import RankFailed
from hvdtrain.system.signals import describe_deadly_signal
from hvdtrain.system.text import format_count

SSH_FAILURE_CODE = 255  # ssh's own code, also if a signal ended its command; which one is not known


class Outcome(NamedTuple):
    """A run's exit code, and what to print about it ("" for nothing)."""

    code: int
    text: str


def determine_outcome(report: JobReport, launcher: str, code: int, stop_signal: int | None = None) -> Outcome:
    """Return the outcome of a run with a fixed number of ranks.

    A launcher turns most exit codes of ranks into its own, and ends the others once one has failed. So what the ranks
    reported themselves comes first, then what the launcher reports of them, then its own code.

    Args:
        report: what was reported.
        launcher: its name.
        code: its exit code.
        stop_signal: by which the user asked for a stop, if so.
    """
    exits = report.rank_exits()
    return (
        _failed_by_itself(report)
        or _saved_or_not_begun(report, exits, stop_signal)
        or _lost_without_a_message(report, exits, code)
        or _failed_with_others(report)
        or _ended_by_launcher(report, launcher, code, stop_signal)
    )


def _failed_by_itself(report: JobReport) -> Outcome | None:
    """Return the outcome if a rank reported an error of its own, or all failed ones waited for one that hung."""
    causes = [failure for failure in report.failures if not is_consequence(failure)]
    if causes:
        return rank_failure_outcome(report, causes[0])
    if report.failures and report.standstill_text:
        others = describe_other_failures(len(report.failures))
        return Outcome(EXIT_FAILED, f"error: {report.standstill_text}\n{others}")
    return None


def _saved_or_not_begun(report: JobReport, exits: Sequence[RankExit], stop_signal: int | None) -> Outcome | None:
    """Return the outcome if ranks agreed to save, or the user's signal ended rank 0 before it could catch it."""
    if EXIT_REQUEUE in report.finished.values():
        return Outcome(EXIT_REQUEUE, "")
    if stop_signal and any(RankExit(0, 128 + number) in exits for number in (signal.SIGTERM, signal.SIGUSR1)):
        code = EXIT_REQUEUE if stop_signal == signal.SIGUSR1 else 128 + stop_signal
        return Outcome(code, "rank 0 was stopped before training began: there was nothing to save")
    return None


def _lost_without_a_message(report: JobReport, exits: Sequence[RankExit], code: int) -> Outcome | None:
    """Return the outcome if a rank ended badly, or its host was lost, and could not report it."""
    reported = {failure.rank for failure in report.failures} | set(report.finished)
    others = f"\n{describe_other_failures(len(report.failures))}" if report.failures else ""
    # SIGTERM is what a launcher ends the other ranks with.
    silent = [end for end in exits if end.rank not in reported and end.code != 128 + signal.SIGTERM]
    if silent:
        return silent_exit_outcome(report, silent[0], others)
    if len(report.finished) < len(report.hosts):
        if host := report.lost_host():
            return Outcome(EXIT_FAILED, describe_loss(report, host, "the connection to the host failed"))
        if (host := report.lost_peer_host) and code:
            return Outcome(EXIT_FAILED, describe_loss(report, host, "it ended, or its host did, without a message"))
    # No launcher reports a rank that ended with code 0; the others have lost it all the same.
    vanished = sorted(set(report.started) - reported - {end.rank for end in exits})
    if vanished and (report.failures or code == 0):
        return silent_exit_outcome(report, RankExit(vanished[0], 0), others)
    return None


def _failed_with_others(report: JobReport) -> Outcome | None:
    """Return the outcome if all ranks that reported a failure had lost another one, and it is not known which."""
    return rank_failure_outcome(report, report.failures[0]) if report.failures else None


def _ended_by_launcher(report: JobReport, launcher: str, code: int, stop_signal: int | None) -> Outcome:
    """Return the outcome by the launcher's own code: no rank failed."""
    if code == 0:
        return Outcome(0, "")
    if report.hosts and len(report.finished) == len(report.hosts):
        return Outcome(0, f"warning: all ranks finished, and then {launcher} ended with code {code}")
    if stop_signal:
        return Outcome(128 + stop_signal, "")
    return Outcome(EXIT_FAILED, f"error: {launcher} ended with code {code}; no rank reported why")


def determine_program_outcome(report: JobReport, launcher: str, code: int, stop_signal: int | None = None) -> Outcome:
    """Return the outcome of a program that is not a recipe: its own exit codes count.

    The arguments are those of `determine_outcome`.
    """
    codes = set(report.finished.values())
    causes = [failure for failure in report.failures if not is_consequence(failure)]
    if causes:
        return rank_failure_outcome(report, causes[0])
    if EXIT_REQUEUE in codes:
        return Outcome(EXIT_REQUEUE, "")
    all_finished = bool(report.hosts) and len(report.finished) == len(report.hosts)
    if stop_signal:
        return Outcome(0 if all_finished and codes == {0} else 128 + stop_signal, "")
    ended = report.ended_ranks()
    exits = [end for end in report.rank_exits() if end.rank not in ended and end.code != 128 + signal.SIGTERM]
    if report.failures and not exits:  # of the others, the launcher ended those that did not report it
        return rank_failure_outcome(report, report.failures[0])
    if lost := _lost_without_a_message(report, exits, code):
        return Outcome(exits[0].code if exits and exits[0].code > 128 else lost.code, lost.text)
    return _ended_by_launcher(report, launcher, code, stop_signal)


def determine_elastic_program_outcome(
    report: JobReport, launcher: str, code: int, stop_signal: int | None = None
) -> Outcome:
    """Return the outcome of an elastic program: workers may have been lost on the way; how the last ones ended counts.

    The arguments are those of `determine_outcome`; the ranks of the report are numbers of workers.
    """
    codes = set(report.finished.values())
    if EXIT_REQUEUE in codes:
        return Outcome(EXIT_REQUEUE, "")
    if stop_signal:
        return Outcome(0 if codes == {0} and not report.running else 128 + stop_signal, "")
    if report.failures:
        first = next((one for one in report.failures if not is_consequence(one)), report.failures[0])
        text = f"error: a worker on {first.host} failed: {first.error}\n{first.traceback}".rstrip()
        if len(report.failures) > 1:
            text += f"\n{describe_other_failures(len(report.failures) - 1)}"
        return Outcome(first.code, text)
    if 0 in codes:
        return Outcome(0, "")
    return Outcome(EXIT_FAILED, f"error: {launcher} ended with code {code}, and all workers with it")


def determine_elastic_outcome(report: JobReport, launcher: str, code: int, stop_signal: int | None = None) -> Outcome:
    """Return the outcome of an elastic run: ranks may have been lost on the way; how the last ones ended counts.

    The arguments are those of `determine_outcome`.
    """
    if report.failures:  # of a rank that the others have not outlived
        return rank_failure_outcome(report, report.failures[0])
    codes = set(report.finished.values())
    if codes:
        return Outcome(0 if 0 in codes else EXIT_REQUEUE, "")
    if stop_signal:
        return Outcome(128 + stop_signal, "")
    return Outcome(EXIT_FAILED, f"error: {launcher} ended with code {code}, and all ranks with it")


def describe_loss(report: JobReport, host: str, why: str) -> str:
    """Return a line about the loss of a host or of a rank on it: which ranks it can have been."""
    numbers = [str(rank) for rank, name in enumerate(report.hosts) if name == host]
    which = f"rank {' or '.join(numbers)} on {host}" if numbers else f"a rank on {host}"
    return f"error: {which} was lost: {why}"


def rank_failure_outcome(report: JobReport, failure: RankFailed) -> Outcome:
    """Return the outcome of a failure that a rank reported."""
    where = report.describe_rank(failure.rank)
    if not report.hosts and failure.host:  # of an elastic run, where ranks have been other workers
        where = f"rank {failure.rank} on {failure.host}"
    is_agreed = failure.origin is not None  # all ranks end with this error, which names a rank if need be
    failed = "" if is_agreed else f"{where} failed: "
    text = f"error: {failed}{failure.error or 'it did not report why'}"
    if failure.traceback:
        text += f"\n{failure.traceback.rstrip()}"
    if len(report.failures) > 1 and not is_agreed:
        text += f"\n{describe_other_failures(len(report.failures) - 1)}"
    return Outcome(failure.code if 0 < failure.code < 256 else EXIT_FAILED, text)


def silent_exit_outcome(report: JobReport, end: RankExit, others: str) -> Outcome:
    """Return the outcome of a rank's end without a message; `others` is appended to the text."""
    if end.code == EXIT_REQUEUE:
        return Outcome(EXIT_REQUEUE, "")
    where = report.describe_rank(end.rank)
    number = end.code - 128
    if not 0 < number <= signal.SIGRTMAX:
        code = EXIT_USER_ERROR if end.code == EXIT_USER_ERROR else EXIT_FAILED
        over_ssh = end.code == SSH_FAILURE_CODE and len(set(report.hosts)) > 1
        hint = ": over ssh, that is a rank killed by a signal, or a lost connection" if over_ssh else ""
        hint = " before it had finished" if end.code == 0 else hint
        return Outcome(code, f"error: {where} ended with code {end.code} and no message{hint}{others}")
    return Outcome(EXIT_FAILED, f"error: {where} was killed by {describe_deadly_signal(number)}{others}")


def describe_outlived_failure(failure: RankFailed) -> str:
    """Return that a worker of an elastic run has failed and the others continue, with its error and traceback."""
    return f"a worker on {failure.host} failed, the others continue: {failure.error}\n{failure.traceback}".rstrip()


def describe_other_failures(count: int) -> str:
    """Return the one line about the ranks that failed because one did."""
    return f"({format_count(count, 'other rank')} ended with it)"


def choose_outcome_rules(*, is_elastic: bool, is_program: bool) -> Callable[[JobReport, str, int, int | None], Outcome]:
    """Return the function that determines the outcome of a kind of job."""
    if is_program:
        return determine_elastic_program_outcome if is_elastic else determine_program_outcome
    return determine_elastic_outcome if is_elastic else determine_outcome
