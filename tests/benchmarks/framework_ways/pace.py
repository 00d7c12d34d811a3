"""Turns of ways that are measured side by side: all of them are started, and one of them trains at a time.

    the benchmark       rank 0 and rank 1 of a way
    go  ------------->  N steps, of which each is timed from its begin to the next one's
        <-------------  done: the seconds of each step, as a line of JSON

A way's ranks are stopped between their turns (SIGSTOP), because Horovod's threads exchange messages all the time.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

FOLDER_VARIABLE = "BENCH_PACE"  # holds the pipes of a way; also what its processes are found by


def go_pipe(folder: Path, rank: int) -> Path:
    """The pipe by which a rank is let go."""
    return folder / f"go{rank}"


def done_pipe(folder: Path, rank: int) -> Path:
    """The pipe by which a rank reports a turn."""
    return folder / f"done{rank}"


class Pace:
    """A rank's side.

    Attributes:
        parts: seconds of each part of the steps of this turn, by name, for ways that are taken apart.
    """

    def __init__(self) -> None:
        folder, rank = Path(os.environ[FOLDER_VARIABLE]), int(os.environ["HOROVOD_RANK"])
        self._go, self._done = go_pipe(folder, rank).open(), done_pipe(folder, rank).open("w")
        self._seconds: list[float] = []
        self._begin: float | None = None
        self._left = 0  # steps of this turn
        self.parts: dict[str, float] = {}

    def begin_step(self) -> None:
        """Note that a step begins. At the end of a turn, report it and wait for the next; there may be none."""
        if self._begin is not None:
            self._seconds.append(time.perf_counter() - self._begin)
            self._left -= 1
        if self._left == 0:
            if self._begin is not None:
                self._done.write(json.dumps({"seconds": self._seconds, "parts": self.parts}) + "\n")
                self._done.flush()
            steps = self._go.readline()
            if not steps:
                os._exit(0)  # the benchmark is over; no framework is asked to shut down
            self._left = int(steps)
            self._seconds.clear()
            self.parts.clear()
        self._begin = time.perf_counter()

    def add(self, part: str, seconds: float) -> None:
        """Count seconds to a part of this turn's steps."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds
