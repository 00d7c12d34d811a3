"""What the ranks and the launcher have said, and what it amounts to: who failed first, why, and the exit code."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from hvdtrain.launch.output import PEER, Death, Line, deaths, lost_host
from hvdtrain.launch.standstill import COLLECT, describe_standstill, parse_standstill, state_of
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER

HOLD_SECONDS = 5.0  # a launcher's line waits so long for a rank's own words, which would make it noise
OVER_SECONDS = 10.0  # for the launcher to end when all ranks have finished
KEEP_LINES = 1000  # of the launcher's own
SSH_FAILED = 255  # ssh's own code, also where a signal ended the command: it does not say which
# Horovod raises it in every rank that has lost another one: what broke the other one is the cause.
CONSEQUENCE = "HorovodInternalError"


Process = tuple[Any, Any]  # host and process id


def process_of(message: dict[str, Any]) -> Process:
    """Whom a message is from."""
    return message.get("host"), message.get("pid")


class Report:
    """What has been said so far in one run; `hosts` is the host name of each rank."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.started: dict[int, dict[str, Any]] = {}
        self.finished: dict[int, int] = {}
        self.running: set[int] = set()  # of an elastic run's newest generation, as far as is known
        self.over_since: float | None = None  # when the last rank finished, by the monotonic clock
        self.failed: list[dict[str, Any]] = []
        self.launcher: deque[str] = deque(maxlen=KEEP_LINES)
        self.held: deque[tuple[float, Line]] = deque()
        self.standing: dict[Process, dict[str, Any]] = {}  # what ranks reported to be in, as no step is made
        self.standing_due: float | None = None  # when that is put together, by the monotonic clock
        self.stuck = ""  # who hangs, as last put together
        self.peer: str | None = None  # the host of a rank that another rank missed first

    def take(self, message: dict[str, Any]) -> None:
        """Note a rank's message; one that is not whole is passed over."""
        rank, kind = message.get("rank"), message["kind"]
        if not isinstance(rank, int):
            return
        if kind == "started" and isinstance(message.get("pid"), int):
            self.started[rank] = message
            self.over_since = None
            self.running = {other for other in self.running if other < message.get("size", rank)} | {rank}
            if "size" in message:  # of a generation: ranks that it has not any more failed without ending the run
                self.started = {rank: told for rank, told in self.started.items() if rank < message["size"]}
                self.failed = [failure for failure in self.failed if process_of(failure) in self.processes()]
        elif kind == "finished":
            self.finished[rank] = int(message.get("code") or 0)
            self.running.discard(rank)
            over = len(self.finished) == len(self.hosts) if self.hosts else not self.running
            self.over_since = time.monotonic() if over else None
        elif kind == "failed" and not (message.get("ends") is False and self.failed):  # a supervisor's is no news then
            self.failed.append(message)
            if not self.stuck and is_consequence(message):
                stopped = [(rank, state) for rank, state in self.silent().items() if state]
                self.stuck = f"{self.where(stopped[0][0])} does not take part: {stopped[0][1]}" if stopped else ""
        elif kind == "standstill" and parse_standstill(message) is not None:
            self.standing[process_of(message)] = message
            self.standing_due = self.standing_due or time.monotonic() + COLLECT

    def over_at(self) -> float | None:
        """When the launcher should have ended, as all ranks have finished, by the monotonic clock."""
        return None if self.over_since is None else self.over_since + OVER_SECONDS

    def silent(self) -> dict[int, str]:
        """The ranks that have neither ended nor reported what they are in, and why that may be, or ""."""
        ended = {*self.finished, *(failure["rank"] for failure in self.failed)}
        unheard = {
            rank: told
            for rank, told in self.started.items()
            if rank not in ended and process_of(told) not in self.standing
        }
        return {rank: state_of(*process_of(told)) for rank, told in unheard.items()}

    def standstill(self) -> str:
        """Put together who hangs and who waits for whom, and begin anew; "" if nobody hangs."""
        known, reports, after = self.processes(), {}, 0.0
        for process, message in self.standing.items():
            stands = parse_standstill(message)
            if stands is not None:
                name = self.where(message["rank"]) if process in known else f"a new worker on {process[0]}"
                reports[name] = stands
                after = max(after, float(message["after"]))
        silent = {self.where(rank): why for rank, why in self.silent().items()}
        text = describe_standstill(reports, silent, after)
        self.standing, self.standing_due = {}, None
        self.stuck = text or self.stuck
        return text

    def newcomer(self, message: dict[str, Any]) -> bool:
        """Whether a message is of a worker that is not yet one of an elastic run's ranks, which go on without it."""
        known = self.processes()
        failed = message["kind"] == "failed" and message.get("ends") is not True
        return failed and bool(known) and process_of(message) not in known

    def processes(self) -> set[Process]:
        return {process_of(told) for told in self.started.values()}

    def host(self, rank: int) -> str:
        """The name by which this host can reach a rank's; its own name may mean nothing here."""
        told = self.started[rank]
        return self.hosts[rank] if rank < len(self.hosts) else str(told.get("reach") or told.get("host"))

    def hear(self, line: Line) -> None:
        """Note what a rank's MPI library says of another: it aborts its own rank, which is all that mpirun sees."""
        match = PEER.match(line.text)
        if match and self.peer is None:
            self.peer = match.group(1)

    def hold(self, line: Line) -> None:
        """Note a line of the launcher itself, to be shown later if at all."""
        self.launcher.append(line.text)
        self.held.append((time.monotonic() + HOLD_SECONDS, line))

    def due(self, *, last: bool = False) -> list[Line]:
        """The held lines to show now: all, or those that waited long enough; none if a rank's end explains them."""
        said = list(self.launcher)
        if self.failed or any(self.finished.values()) or deaths(said) or lost_host(said):
            self.held.clear()
        lines = []
        while self.held and (last or self.held[0][0] <= time.monotonic()):
            lines.append(self.held.popleft()[1])
        return lines

    def next_due(self) -> float | None:
        """When the first held line is due, by the monotonic clock."""
        return self.held[0][0] if self.held else None

    def where(self, rank: int) -> str:
        """`rank 1 on host-b`, by the host's own name if the rank has told it."""
        host = self.started.get(rank, {}).get("host") or (self.hosts[rank] if rank < len(self.hosts) else None)
        return f"rank {rank} on {host}" if host else f"rank {rank}"


def outcome(report: Report, launcher: str, code: int, asked: int | None = None) -> tuple[int, str]:
    """The run's exit code, and what to say about it ("" for nothing).

    `code` is the launcher's; it turns most codes of ranks into its own, so what ranks said goes first. `asked` is the
    signal by which the user asked for a stop.
    """
    spoke = {message["rank"] for message in report.failed} | set(report.finished)
    fell = deaths(list(report.launcher))
    # A launcher ends the other ranks with SIGTERM once one has failed.
    silent = [death for death in fell if death.rank not in spoke and death.code != 128 + signal.SIGTERM]
    # No launcher reports a rank that ended with code 0; the others have lost it all the same.
    vanished = sorted(set(report.started) - spoke - {death.rank for death in fell})
    causes = [message for message in report.failed if not is_consequence(message)]
    if causes:
        return failed_first(report, causes[0])
    if report.failed and report.stuck:
        return EXIT_FAILED, f"error: {report.stuck}\n{count_others(len(report.failed))}"
    if EXIT_REQUEUE in report.finished.values():
        return EXIT_REQUEUE, ""  # the ranks agree on it, when the state is saved
    if asked and any(Death(0, 128 + number) in fell for number in (signal.SIGTERM, signal.SIGUSR1)):
        code = EXIT_REQUEUE if asked == signal.SIGUSR1 else 128 + asked
        return code, "rank 0 ended on the signal: it had not begun, and there was nothing to save"
    others = f"\n{count_others(len(report.failed))}" if report.failed else ""
    if silent:
        return silent_death(report, silent[0], others)
    gone = lost_host(list(report.launcher))
    if gone and len(report.finished) < len(report.hosts):
        return EXIT_FAILED, lost_text(report, gone, "the connection to the host failed")
    if report.peer and code and len(report.finished) < len(report.hosts):
        return EXIT_FAILED, lost_text(report, report.peer, "it ended, or its host did, without a message")
    if vanished and (report.failed or code == 0):
        return silent_death(report, Death(vanished[0], 0), others)
    if report.failed:
        return failed_first(report, report.failed[0])
    if code == 0:
        return 0, ""
    if report.hosts and len(report.finished) == len(report.hosts):
        return 0, f"warning: all ranks finished, and then {launcher} ended with code {code}"
    return (128 + asked, "") if asked else (EXIT_FAILED, f"error: {launcher} ended with code {code}; no rank said why")


def elastic_outcome(report: Report, launcher: str, code: int, asked: int | None = None) -> tuple[int, str]:
    """As `outcome`, of an elastic run: ranks may have been lost on the way, what counts is how the last ones ended."""
    if report.failed:  # by a rank that the others have not outlived
        return failed_first(report, report.failed[0])
    codes = set(report.finished.values())
    if codes:
        return (0 if 0 in codes else EXIT_REQUEUE), ""
    if asked:
        return 128 + asked, ""
    return EXIT_FAILED, f"error: {launcher} ended with code {code}, and all ranks with it"


def lost_text(report: Report, host: str, why: str) -> str:
    """The loss of a host or of a rank on it, in words: which rank it can have been."""
    numbers = [str(rank) for rank, name in enumerate(report.hosts) if name == host]
    which = f"rank {' or '.join(numbers)} on {host}" if numbers else f"a rank on {host}"
    return f"error: {which} was lost: {why}"


def failed_first(report: Report, message: dict[str, Any]) -> tuple[int, str]:
    """The code of a rank's failure, and the failure in words."""
    where = report.where(message["rank"])
    if not report.hosts and message.get("host"):  # of an elastic run, where ranks have been other workers
        where = f"rank {message['rank']} on {message['host']}"
    agreed = isinstance(message.get("origin"), int)  # all ranks end with this error, which names a rank if need be
    failed = "" if agreed else f"{where} failed: "
    text = f"error: {failed}{message.get('error') or 'it did not say why'}"
    if message.get("traceback"):
        text += f"\n{str(message['traceback']).rstrip()}"
    if len(report.failed) > 1 and not agreed:
        text += f"\n{count_others(len(report.failed) - 1)}"
    code = message.get("code")
    return (code if isinstance(code, int) and 0 < code < 256 else EXIT_FAILED), text


def silent_death(report: Report, death: Death, others: str) -> tuple[int, str]:
    """The code of a rank's end without a message, and that end in words."""
    if death.code == EXIT_REQUEUE:
        return EXIT_REQUEUE, ""
    where = report.where(death.rank)
    number = death.code - 128
    if not 0 < number <= signal.SIGRTMAX:
        code = EXIT_USER if death.code == EXIT_USER else EXIT_FAILED
        over_ssh = death.code == SSH_FAILED and len(set(report.hosts)) > 1
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
    return CONSEQUENCE in failure_text(message) or message.get("waits") is True


def failure_text(message: dict[str, Any]) -> str:
    """All that a failed rank said."""
    return f"{message.get('error')}\n{message.get('traceback')}"


def count_others(count: int) -> str:
    """The one line about the ranks that failed because one did."""
    return f"({count} other {'rank' if count == 1 else 'ranks'} failed with it)"
