"""What a rank says and does when it hangs: a line that names it, and an end at --hang-limit."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict

from hvdtrain.comm.world import rank_from_environment
from hvdtrain.system import messages
from hvdtrain.system.activity import Standstill, Watcher
from hvdtrain.system.errors import EXIT_FAILED
from hvdtrain.system.exits import end_children
from hvdtrain.training.options import HANG_LIMIT


class HangReporter:
    """This rank's watcher, and how it is named. `hvdtrain launch` puts together what all ranks report.

    command: this process is `hvdtrain train`, and so may be ended also if it is a world of one.
    """

    def __init__(self, *, command: bool) -> None:
        self.rank, self.size, self.command = rank_from_environment(), 1, command
        self.watcher = Watcher(self.notice, self.end, HANG_LIMIT if command else 0.0)

    def know(self, rank: int, size: int, limit: float) -> None:
        """Take over this rank's place in the world, and the run's --hang-limit in seconds."""
        self.rank, self.size = rank, size
        self.watcher.limit = limit if self.command or size > 1 else 0.0
        self.watcher.blocked = self.command and size > 1

    def name(self) -> str:
        """`rank 1 on b`."""
        host = socket.gethostname()
        return f"rank {self.rank} on {host}" if self.rank is not None else f"this process on {host}"

    def notice(self, stands: Standstill, after: float) -> None:
        """Report what this rank is in, as no step was made for so long."""
        if messages.launched():
            about = {"rank": self.rank or 0, "host": socket.gethostname(), "pid": os.getpid()}
            messages.send("standstill", **about, **asdict(stands), after=after)
        elif stands.seconds >= after:
            print(f"hvdtrain: {self.name()} has been {stands} for {stands.seconds:.0f} s", file=sys.stderr, flush=True)

    def end(self, stands: Standstill) -> None:
        """End this process, as it hangs; the others are ended by the launcher, or continue without it."""
        error = f"it has been {stands} for {stands.seconds:.0f} s: it hangs, by --hang-limit {self.watcher.limit:g}"
        about = {"rank": self.rank or 0, "host": socket.gethostname(), "pid": os.getpid()}
        fields = {"code": EXIT_FAILED, "error": error, "traceback": "", "waits": stands.waits}
        messages.send("failed", **about, **fields)
        if not messages.launched():
            print(f"hvdtrain: error: {self.name()} failed: {error}", file=sys.stderr, flush=True)
        end_children()
        os._exit(EXIT_FAILED)


class _Current:
    reporter: HangReporter | None = None


@contextlib.contextmanager
def watching(*, command: bool = False) -> Iterator[None]:
    """Watch this rank in a block.

    command: the block is all of `hvdtrain train`, and not part of another program.
    """
    before = _Current.reporter
    _Current.reporter = before or HangReporter(command=command)
    try:
        yield
    finally:
        if before is None:
            _Current.reporter.watcher.stop()
            _Current.reporter = None


def know(rank: int, size: int, limit: float) -> None:
    """Note this rank's place in the world, and the run's --hang-limit in seconds."""
    if _Current.reporter is not None:
        _Current.reporter.know(rank, size, limit)
