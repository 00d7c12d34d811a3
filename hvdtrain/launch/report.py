"""What the ranks and the launcher have said, and what it amounts to: who failed first, why, and the exit code."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from hvdtrain.launch.output import PEER_HOST_PATTERN, OutputLine, RankExit, find_lost_host, find_rank_exits
from hvdtrain.launch.standstill import COLLECT_SECONDS, describe_process_state, describe_standstill, parse_standstill
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR

HOLD_SECONDS = 5.0  # a launcher's line waits so long for a rank's own words, which would make it noise
LAUNCHER_EXIT_SECONDS = 10.0  # for the launcher to end when all ranks have finished
MAX_LAUNCHER_LINES = 1000  # of the launcher's own
SSH_FAILURE_CODE = 255  # ssh's own code, also where a signal ended the command: it does not say which
# Horovod raises it in every rank that has lost another one: what broke the other one is the cause.
LOST_PEER_ERROR = "HorovodInternalError"


ProcessKey = tuple[Any, Any]  # host and process id


def message_sender(message: dict[str, Any]) -> ProcessKey:
    """Whom a message is from."""
    return message.get("host"), message.get("pid")


class JobReport:
    """What has been said so far in one run; `hosts` is the host name of each rank."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.started: dict[int, dict[str, Any]] = {}
        self.finished: dict[int, int] = {}
        self.running: set[int] = set()  # of an elastic run's newest generation, as far as is known
        self.all_finished_at: float | None = None  # when the last rank finished, by the monotonic clock
        self.failures: list[dict[str, Any]] = []
        self.launcher_lines: deque[str] = deque(maxlen=MAX_LAUNCHER_LINES)
        self.held_lines: deque[tuple[float, OutputLine]] = deque()
        self.standstill_messages: dict[
            ProcessKey, dict[str, Any]
        ] = {}  # what ranks reported to be in, as no step is made
        self.standstill_due: float | None = None  # when that is put together, by the monotonic clock
        self.standstill_text = ""  # who hangs, as last put together
        self.lost_peer_host: str | None = None  # the host of a rank that another rank missed first

    def add_message(self, message: dict[str, Any]) -> None:
        """Note a rank's message; one that is not whole is passed over."""
        rank, kind = message.get("rank"), message["kind"]
        if not isinstance(rank, int):
            return
        if kind == "started" and isinstance(message.get("pid"), int):
            self.started[rank] = message
            self.all_finished_at = None
            self.running = {other for other in self.running if other < message.get("size", rank)} | {rank}
            if "size" in message:  # of a generation: ranks that it has not any more failed without ending the run
                self.started = {rank: told for rank, told in self.started.items() if rank < message["size"]}
                self.failures = [
                    failure for failure in self.failures if message_sender(failure) in self.known_processes()
                ]
        elif kind == "finished":
            self.finished[rank] = int(message.get("code") or 0)
            self.running.discard(rank)
            over = len(self.finished) == len(self.hosts) if self.hosts else not self.running
            self.all_finished_at = time.monotonic() if over else None
        elif kind == "failed" and not (
            message.get("ends") is False and self.failures
        ):  # a supervisor's is no news then
            self.failures.append(message)
            if not self.standstill_text and is_consequence(message):
                stopped = [(rank, state) for rank, state in self.silent_ranks().items() if state]
                self.standstill_text = (
                    f"{self.describe_rank(stopped[0][0])} does not take part: {stopped[0][1]}" if stopped else ""
                )
        elif kind == "standstill" and parse_standstill(message) is not None:
            self.standstill_messages[message_sender(message)] = message
            self.standstill_due = self.standstill_due or time.monotonic() + COLLECT_SECONDS

    def launcher_deadline(self) -> float | None:
        """When the launcher should have ended, as all ranks have finished, by the monotonic clock."""
        return None if self.all_finished_at is None else self.all_finished_at + LAUNCHER_EXIT_SECONDS

    def silent_ranks(self) -> dict[int, str]:
        """The ranks that have neither ended nor reported what they are in, and why that may be, or ""."""
        ended = {*self.finished, *(failure["rank"] for failure in self.failures)}
        unheard = {
            rank: told
            for rank, told in self.started.items()
            if rank not in ended and message_sender(told) not in self.standstill_messages
        }
        return {rank: describe_process_state(*message_sender(told)) for rank, told in unheard.items()}

    def summarize_standstill(self) -> str:
        """Put together who hangs and who waits for whom, and begin anew; "" if nobody hangs."""
        known, reports, after = self.known_processes(), {}, 0.0
        for process, message in self.standstill_messages.items():
            stands = parse_standstill(message)
            if stands is not None:
                name = self.describe_rank(message["rank"]) if process in known else f"a new worker on {process[0]}"
                reports[name] = stands
                after = max(after, float(message["after"]))
        silent = {self.describe_rank(rank): why for rank, why in self.silent_ranks().items()}
        text = describe_standstill(reports, silent, after)
        self.standstill_messages, self.standstill_due = {}, None
        self.standstill_text = text or self.standstill_text
        return text

    def is_from_newcomer(self, message: dict[str, Any]) -> bool:
        """Whether a message is of a worker that is not yet one of an elastic run's ranks, which go on without it."""
        known = self.known_processes()
        failed = message["kind"] == "failed" and message.get("ends") is not True
        return failed and bool(known) and message_sender(message) not in known

    def known_processes(self) -> set[ProcessKey]:
        return {message_sender(told) for told in self.started.values()}

    def reachable_host(self, rank: int) -> str:
        """The name by which this host can reach a rank's; its own name may mean nothing here."""
        told = self.started[rank]
        return self.hosts[rank] if rank < len(self.hosts) else str(told.get("reach") or told.get("host"))

    def note_lost_peer(self, line: OutputLine) -> None:
        """Note what a rank's MPI library says of another: it aborts its own rank, which is all that mpirun sees."""
        match = PEER_HOST_PATTERN.match(line.text)
        if match and self.lost_peer_host is None:
            self.lost_peer_host = match.group(1)

    def hold_line(self, line: OutputLine) -> None:
        """Note a line of the launcher itself, to be shown later if at all."""
        self.launcher_lines.append(line.text)
        self.held_lines.append((time.monotonic() + HOLD_SECONDS, line))

    def pop_due_lines(self, *, last: bool = False) -> list[OutputLine]:
        """The held lines to show now: all, or those that waited long enough; none if a rank's end explains them."""
        said = list(self.launcher_lines)
        if self.failures or any(self.finished.values()) or find_rank_exits(said) or find_lost_host(said):
            self.held_lines.clear()
        lines = []
        while self.held_lines and (last or self.held_lines[0][0] <= time.monotonic()):
            lines.append(self.held_lines.popleft()[1])
        return lines

    def next_due_at(self) -> float | None:
        """When the first held line is due, by the monotonic clock."""
        return self.held_lines[0][0] if self.held_lines else None

    def describe_rank(self, rank: int) -> str:
        """`rank 1 on host-b`, by the host's own name if the rank has told it."""
        host = self.started.get(rank, {}).get("host") or (self.hosts[rank] if rank < len(self.hosts) else None)
        return f"rank {rank} on {host}" if host else f"rank {rank}"


def determine_outcome(report: JobReport, launcher: str, code: int, asked: int | None = None) -> tuple[int, str]:
    """The run's exit code, and what to say about it ("" for nothing).

    `code` is the launcher's; it turns most codes of ranks into its own, so what ranks said goes first. `asked` is the
    signal by which the user asked for a stop.
    """
    spoke = {message["rank"] for message in report.failures} | set(report.finished)
    fell = find_rank_exits(list(report.launcher_lines))
    # A launcher ends the other ranks with SIGTERM once one has failed.
    silent = [death for death in fell if death.rank not in spoke and death.code != 128 + signal.SIGTERM]
    # No launcher reports a rank that ended with code 0; the others have lost it all the same.
    vanished = sorted(set(report.started) - spoke - {death.rank for death in fell})
    causes = [message for message in report.failures if not is_consequence(message)]
    if causes:
        return rank_failure_outcome(report, causes[0])
    if report.failures and report.standstill_text:
        return EXIT_FAILED, f"error: {report.standstill_text}\n{describe_other_failures(len(report.failures))}"
    if EXIT_REQUEUE in report.finished.values():
        return EXIT_REQUEUE, ""  # the ranks agree on it, when the state is saved
    if asked and any(RankExit(0, 128 + number) in fell for number in (signal.SIGTERM, signal.SIGUSR1)):
        code = EXIT_REQUEUE if asked == signal.SIGUSR1 else 128 + asked
        return code, "rank 0 ended on the signal: it had not begun, and there was nothing to save"
    others = f"\n{describe_other_failures(len(report.failures))}" if report.failures else ""
    if silent:
        return silent_exit_outcome(report, silent[0], others)
    gone = find_lost_host(list(report.launcher_lines))
    if gone and len(report.finished) < len(report.hosts):
        return EXIT_FAILED, describe_loss(report, gone, "the connection to the host failed")
    if report.lost_peer_host and code and len(report.finished) < len(report.hosts):
        return EXIT_FAILED, describe_loss(report, report.lost_peer_host, "it ended, or its host did, without a message")
    if vanished and (report.failures or code == 0):
        return silent_exit_outcome(report, RankExit(vanished[0], 0), others)
    if report.failures:
        return rank_failure_outcome(report, report.failures[0])
    if code == 0:
        return 0, ""
    if report.hosts and len(report.finished) == len(report.hosts):
        return 0, f"warning: all ranks finished, and then {launcher} ended with code {code}"
    return (128 + asked, "") if asked else (EXIT_FAILED, f"error: {launcher} ended with code {code}; no rank said why")


def determine_elastic_outcome(report: JobReport, launcher: str, code: int, asked: int | None = None) -> tuple[int, str]:
    """As `outcome`, of an elastic run: ranks may have been lost on the way, what counts is how the last ones ended."""
    if report.failures:  # by a rank that the others have not outlived
        return rank_failure_outcome(report, report.failures[0])
    codes = set(report.finished.values())
    if codes:
        return (0 if 0 in codes else EXIT_REQUEUE), ""
    if asked:
        return 128 + asked, ""
    return EXIT_FAILED, f"error: {launcher} ended with code {code}, and all ranks with it"


def describe_loss(report: JobReport, host: str, why: str) -> str:
    """The loss of a host or of a rank on it, in words: which rank it can have been."""
    numbers = [str(rank) for rank, name in enumerate(report.hosts) if name == host]
    which = f"rank {' or '.join(numbers)} on {host}" if numbers else f"a rank on {host}"
    return f"error: {which} was lost: {why}"


def rank_failure_outcome(report: JobReport, message: dict[str, Any]) -> tuple[int, str]:
    """The code of a rank's failure, and the failure in words."""
    where = report.describe_rank(message["rank"])
    if not report.hosts and message.get("host"):  # of an elastic run, where ranks have been other workers
        where = f"rank {message['rank']} on {message['host']}"
    agreed = isinstance(message.get("origin"), int)  # all ranks end with this error, which names a rank if need be
    failed = "" if agreed else f"{where} failed: "
    text = f"error: {failed}{message.get('error') or 'it did not say why'}"
    if message.get("traceback"):
        text += f"\n{str(message['traceback']).rstrip()}"
    if len(report.failures) > 1 and not agreed:
        text += f"\n{describe_other_failures(len(report.failures) - 1)}"
    code = message.get("code")
    return (code if isinstance(code, int) and 0 < code < 256 else EXIT_FAILED), text


def silent_exit_outcome(report: JobReport, death: RankExit, others: str) -> tuple[int, str]:
    """The code of a rank's end without a message, and that end in words."""
    if death.code == EXIT_REQUEUE:
        return EXIT_REQUEUE, ""
    where = report.describe_rank(death.rank)
    number = death.code - 128
    if not 0 < number <= signal.SIGRTMAX:
        code = EXIT_USER_ERROR if death.code == EXIT_USER_ERROR else EXIT_FAILED
        over_ssh = death.code == SSH_FAILURE_CODE and len(set(report.hosts)) > 1
        hint = ": over ssh, that is a rank killed by a signal, or a lost connection" if over_ssh else ""
        hint = " before it had finished" if death.code == 0 else hint
        return code, f"error: {where} ended with code {death.code} and no message{hint}{others}"
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = "unknown"
    hint = "; out of memory, if nobody sent it" if number == signal.SIGKILL else ""
    return EXIT_FAILED, f"error: {where} was killed by signal {number} ({name}){hint}{others}"


def is_consequence(message: dict[str, Any]) -> bool:
    """Whether a rank failed only because another one did, or hung while it waited for another one."""
    return LOST_PEER_ERROR in failure_text(message) or message.get("waits") is True


def failure_text(message: dict[str, Any]) -> str:
    """All that a failed rank said."""
    return f"{message.get('error')}\n{message.get('traceback')}"


def describe_other_failures(count: int) -> str:
    """The one line about the ranks that failed because one did."""
    return f"({count} other {'rank' if count == 1 else 'ranks'} failed with it)"
