"""What benchmarks of recovery read: which steps were completed when, and where each rank lives."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

EVERY = 0.0015  # seconds between looks
METRICS, RANKS = "metrics.jsonl", "ranks.jsonl"


class StepLog:
    """A rank's end of it: rank 0 appends a row a step, each rank one when it enters a world."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.rank, self.size, self.world = rank, size, time.time()
        append(folder / RANKS, {"rank": rank, "size": size, "pid": os.getpid()})
        self.path = folder / METRICS

    def step(self, number: int) -> None:
        if self.rank == 0:
            append(self.path, {"step": number, "size": self.size, "world": self.world})


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


class Seen(NamedTuple):
    """A row that appeared at the end of the file, by this host's monotonic clock."""

    at: float
    row: dict[str, Any]


class Watch(threading.Thread):
    """Looks at metrics.jsonl all the time."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.seen: list[Seen] = []
        self.reopened: list[float] = []  # when the file was opened again, which cuts it to what is to stand
        self.ended = threading.Event()

    def run(self) -> None:
        size = changed = 0
        while not self.ended.wait(EVERY):
            try:
                stat = self.path.stat()
                if (stat.st_mtime_ns, stat.st_size) == (changed, size):
                    continue
                now = time.monotonic()
                with self.path.open("rb") as file:
                    file.seek(max(0, stat.st_size - 4096))
                    text = file.read(min(4096, stat.st_size))
                row = json.loads(text[: text.rindex(b"\n")].split(b"\n")[-1])
            except (FileNotFoundError, ValueError):  # not there yet, or half a row
                continue
            grown = stat.st_size > size
            if changed and not grown:
                self.reopened.append(now)
            size, changed = stat.st_size, stat.st_mtime_ns
            if not self.seen or grown or row["step"] > self.seen[-1].row["step"]:
                self.seen.append(Seen(now, row))
