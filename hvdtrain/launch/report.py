"""What the ranks and the launcher of a job have reported so far."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from hvdtrain.launch.output import (
    DEFAULT_FORMAT,
    PEER_HOST_PATTERN,
    OutputFormat,
    OutputLine,
    RankExit,
    find_lost_host,
    find_rank_exits,
)
from hvdtrain.launch.standstill import describe_process_state, describe_standstill
from hvdtrain.system.limits import LaunchLimits
from hvdtrain.system.messages import RankFailed, RankFinished, RankMessage, RankStandstill, RankStarted

MAX_LAUNCHER_LINES = 1000  # of the launcher's own
# Horovod raises it in every rank that has lost another one: what broke the other one is the cause.
LOST_PEER_ERROR = "HorovodInternalError"


ProcessKey = tuple[str | None, int | None]  # host and process id


def message_sender(message: RankStarted | RankFailed | RankFinished | RankStandstill) -> ProcessKey:
    """Return which process a message is from."""
    return message.host, message.pid


def is_consequence(failure: RankFailed) -> bool:
    """Return whether a rank failed only because another one did, or hung while it waited for another one."""
    return failure.waits or LOST_PEER_ERROR in failure.error or LOST_PEER_ERROR in failure.traceback


class JobReport:
    """What has been reported so far in one job."""

    def __init__(self, hosts: Sequence[str], output_format: OutputFormat = DEFAULT_FORMAT) -> None:
        """Begin an empty report.

        Args:
            hosts: the name of the host of each rank; empty if that is not known.
            output_format: how to read the launcher's own lines.
        """
        self.hosts = hosts
        self.output_format = output_format
        self.started: dict[int, RankStarted] = {}
        self.finished: dict[int, int] = {}  # exit codes
        self.running: set[int] = set()  # of an elastic run's newest generation, as far as is known
        self.all_finished_at: float | None = None  # monotonic time at which the last rank finished
        self.failures: list[RankFailed] = []
        self.launcher_lines: deque[str] = deque(maxlen=MAX_LAUNCHER_LINES)
        self.held_lines: deque[tuple[float, OutputLine]] = deque()  # with the monotonic time at which each is due
        self.standstill_messages: dict[ProcessKey, RankStandstill] = {}  # what ranks are in, as no step is made
        self.standstill_due: float | None = None  # monotonic time at which these are summarized
        self.standstill_text = ""  # who hangs, as last summarized
        self.lost_peer_host: str | None = None  # the host of a rank that another rank missed first

    def add_message(self, message: RankMessage) -> None:
        """Add a rank's message; its progress is not kept."""
        if isinstance(message, RankStarted):
            self._add_start(message)
        elif isinstance(message, RankFinished):
            self.finished[message.rank] = message.code
            self.running.discard(message.rank)
            is_last = len(self.finished) == len(self.hosts) if self.hosts else not self.running
            self.all_finished_at = time.monotonic() if is_last else None
        elif isinstance(message, RankFailed):
            self._add_failure(message)
        elif isinstance(message, RankStandstill):
            self.standstill_messages[message_sender(message)] = message
            self.standstill_due = self.standstill_due or time.monotonic() + LaunchLimits.standstill

    def _add_start(self, message: RankStarted) -> None:
        self.started[message.rank] = message
        self.all_finished_at = None
        if message.size is None:
            self.running = {rank for rank in self.running if rank < message.rank} | {message.rank}
            return
        # Of a generation: ranks that are no longer in it failed without ending the run.
        self.running = {rank for rank in self.running if rank < message.size} | {message.rank}
        self.started = {rank: start for rank, start in self.started.items() if rank < message.size}
        known = self.known_processes()
        self.failures = [failure for failure in self.failures if message_sender(failure) in known]

    def _add_failure(self, message: RankFailed) -> None:
        if message.ends is False and self.failures:  # a supervisor's own is not news then
            return
        self.failures.append(message)
        if not self.standstill_text and is_consequence(message):
            stopped = [(rank, state) for rank, state in self.silent_ranks().items() if state]
            if stopped:
                rank, state = stopped[0]
                self.standstill_text = f"{self.describe_rank(rank)} does not take part: {state}"

    def launcher_deadline(self) -> float | None:
        """Return the monotonic time at which the launcher should have ended; None until all ranks have finished."""
        return None if self.all_finished_at is None else self.all_finished_at + LaunchLimits.launcher_exit

    def ended_ranks(self) -> set[int]:
        """Return the ranks that have reported their end."""
        return {*self.finished, *(failure.rank for failure in self.failures)}

    def silent_ranks(self) -> dict[int, str]:
        """Return the ranks that have neither ended nor reported what they are in, and why that may be, or ""."""
        ended = self.ended_ranks()
        silent = {
            rank: message_sender(start)
            for rank, start in self.started.items()
            if rank not in ended and message_sender(start) not in self.standstill_messages
        }
        return {rank: describe_process_state(*process) for rank, process in silent.items()}

    def summarize_standstill(self) -> str:
        """Return who hangs and who waits for whom, "" if nobody hangs, and begin to collect again."""
        known, reports, after = self.known_processes(), {}, 0.0
        for process, message in self.standstill_messages.items():
            name = self.describe_rank(message.rank) if process in known else f"a new worker on {message.host}"
            reports[name] = message.standstill()
            after = max(after, message.after)
        silent = {self.describe_rank(rank): why for rank, why in self.silent_ranks().items()}
        text = describe_standstill(reports, silent, after)
        self.standstill_messages, self.standstill_due = {}, None
        self.standstill_text = text or self.standstill_text
        return text

    def is_from_newcomer(self, message: RankMessage) -> bool:
        """Return whether a message is from a worker that an elastic run has not admitted yet, and continues without."""
        if not isinstance(message, RankFailed) or message.ends is True:
            return False
        known = self.known_processes()
        return bool(known) and message_sender(message) not in known

    def known_processes(self) -> set[ProcessKey]:
        return {message_sender(start) for start in self.started.values()}

    def reachable_host(self, rank: int) -> str:
        """Return the name by which this host can reach a rank's host, whose own name may be unknown here."""
        start = self.started[rank]
        return self.hosts[rank] if rank < len(self.hosts) else start.reach or start.host

    def note_lost_peer(self, line: OutputLine) -> None:
        """Note the rank that a rank's MPI library missed: it aborts its own rank, which is all that mpirun sees."""
        match = PEER_HOST_PATTERN.match(line.text)
        if match and self.lost_peer_host is None:
            self.lost_peer_host = match.group(1)

    def hold_line(self, line: OutputLine) -> None:
        """Keep a line of the launcher itself, to be shown later if at all."""
        self.launcher_lines.append(line.text)
        self.held_lines.append((time.monotonic() + LaunchLimits.hold_line, line))

    def pop_due_lines(self, *, last: bool = False) -> list[OutputLine]:
        """Return the held lines to show now, and hold them no longer; none if a rank's or a host's end explains them.

        Args:
            last: all lines, also those that have not waited long enough.
        """
        if self.held_lines and (self.failures or any(self.finished.values()) or self.rank_exits() or self.lost_host()):
            self.held_lines.clear()
        lines = []
        while self.held_lines and (last or self.held_lines[0][0] <= time.monotonic()):
            lines.append(self.held_lines.popleft()[1])
        return lines

    def next_due_at(self) -> float | None:
        """Return the monotonic time at which the first held line is due; None if there is none."""
        return self.held_lines[0][0] if self.held_lines else None

    def describe_rank(self, rank: int) -> str:
        """Return `rank 1 on host-b`, with the host's own name if the rank has reported it."""
        start = self.started.get(rank)
        host = start.host if start is not None else self.hosts[rank] if rank < len(self.hosts) else None
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def rank_exits(self) -> list[RankExit]:
        """Return the ranks that ended badly by the launcher's own lines."""
        return find_rank_exits(self.launcher_lines, self.output_format)

    def lost_host(self) -> str | None:
        """Return the first host that was lost by the launcher's own lines, or None."""
        return find_lost_host(self.launcher_lines, self.output_format)
