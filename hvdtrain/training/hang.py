"""What a rank reports when it hangs, and its end at --hang-limit."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict

from hvdtrain.comm.world import rank_from_environment
from hvdtrain.system import messages
from hvdtrain.system.activity import HangWatcher, Standstill
from hvdtrain.system.errors import EXIT_FAILED
from hvdtrain.system.exits import stop_descendants
from hvdtrain.training.options import DEFAULT_HANG_LIMIT


class HangReporter:
    """Reports when this rank makes no progress. `hvdtrain launch` combines the reports of all ranks.

    command: this process is `hvdtrain train`, and so may be ended also if it is a world of one.
    """

    def __init__(self, *, command: bool) -> None:
        self.rank, self.size, self.is_train_command = rank_from_environment(), 1, command
        self.watcher = HangWatcher(
            self.report_standstill, self.end_hung_process, DEFAULT_HANG_LIMIT if command else 0.0
        )

    def set_rank_and_limit(self, rank: int, size: int, limit: float) -> None:
        """Take over this rank's place in the world, and the run's --hang-limit in seconds."""
        self.rank, self.size = rank, size
        self.watcher.hang_limit = limit if self.is_train_command or size > 1 else 0.0
        self.watcher.ends_if_blocked = self.is_train_command and size > 1

    def describe_process(self) -> str:
        """Return how messages name this process: `rank 1 on b`."""
        host = socket.gethostname()
        return f"rank {self.rank} on {host}" if self.rank is not None else f"this process on {host}"

    def report_standstill(self, stands: Standstill, after: float) -> None:
        """Report what this rank is doing, as it has made no step for `after` seconds."""
        if messages.is_launched():
            messages.send_message(
                messages.RankStandstill(
                    self.rank or 0, socket.gethostname(), os.getpid(), **asdict(stands), after=after
                )
            )
        elif stands.seconds >= after:
            print(
                f"hvdtrain: {self.describe_process()} has been {stands} for {stands.seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def end_hung_process(self, stands: Standstill) -> None:
        """End this process, as it hangs; the others are ended by the launcher, or continue without it."""
        error = (
            f"it has been {stands} for {stands.seconds:.0f} s: it hangs, by --hang-limit {self.watcher.hang_limit:g}"
        )
        host = socket.gethostname()
        messages.send_message(
            messages.RankFailed(self.rank or 0, host, os.getpid(), EXIT_FAILED, error, waits=stands.waits)
        )
        if not messages.is_launched():
            print(f"hvdtrain: error: {self.describe_process()} failed: {error}", file=sys.stderr, flush=True)
        stop_descendants()
        os._exit(EXIT_FAILED)


class _ActiveReporter:
    reporter: HangReporter | None = None


@contextlib.contextmanager
def watch_for_hangs(*, command: bool = False) -> Iterator[None]:
    """Watch this rank in a block.

    command: the block is all of `hvdtrain train`, and not part of another program.
    """
    before = _ActiveReporter.reporter
    _ActiveReporter.reporter = before or HangReporter(command=command)
    try:
        yield
    finally:
        if before is None:
            _ActiveReporter.reporter.watcher.stop_watching()
            _ActiveReporter.reporter = None


def configure_hang_reporter(rank: int, size: int, limit: float) -> None:
    """Note this rank's place in the world, and the run's --hang-limit in seconds."""
    if _ActiveReporter.reporter is not None:
        _ActiveReporter.reporter.set_rank_and_limit(rank, size, limit)
