"""A worker process as its supervisor sees it: how it is started, its last activity, whether it runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.elastic.slot import Request, Slot, send_request
from hvdtrain.system import cpus
from hvdtrain.system.activity import ACTIVITY_FD_VARIABLE, PATIENT_FACTOR, ActivityRecord

BLOCKED_GRACE = 120.0  # seconds after the hang limit for a worker to end by itself


@dataclass
class WorkerProcess:
    """A worker process and what its supervisor knows of it. Times are by the monotonic clock.

    Attributes:
        member: its name in the store.
        pidfd: becomes readable when it ends.
        requests_fd: the write end of the pipe to it.
        record: its last activity, in memory that it shares.
        stopped_since: when it was first seen stopped by a signal.
        beats: of its hang watcher, when they were last read.
        beats_changed_at: when they last changed.
    """

    process: subprocess.Popen[bytes]
    member: str
    pidfd: int
    requests_fd: int
    record: ActivityRecord
    stopped_since: float | None = None
    beats: int = 0
    beats_changed_at: float = 0.0

    def is_stopped(self, seconds: float) -> bool:
        """Whether it has been stopped by a signal for so many seconds."""
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            self.stopped_since = (self.stopped_since or time.monotonic()) if state in "tT" else None
        return self.stopped_since is not None and time.monotonic() - self.stopped_since > seconds

    def is_blocked(self) -> bool:
        """Whether even its hang watcher has not run for long after the hang limit: a signal may not reach it."""
        beats, _, limit, _ = self.record.read_activity()
        if beats != self.beats:
            self.beats, self.beats_changed_at = beats, time.monotonic()
        return bool(
            beats and limit and time.monotonic() - self.beats_changed_at > PATIENT_FACTOR * limit + BLOCKED_GRACE
        )

    def send(self, request: Request) -> None:
        """Ask it for something, if it still runs."""
        send_request(self.requests_fd, request)

    def close(self) -> None:
        """Close what this process holds of it, after it has ended."""
        os.close(self.pidfd)
        os.close(self.requests_fd)
        self.record.memory.close()


def start_worker(command: Sequence[str], environ: Mapping[str, str], slot: Slot, member: str) -> WorkerProcess:
    """Start a worker as a world of one rank; it joins the others when it has built its model."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    memory = os.memfd_create("hvdtrain-record")
    environ = {name: value for name, value in environ.items() if "RENDEZVOUS" not in name}
    environ |= slot.worker_environment(member, reading) | {ACTIVITY_FD_VARIABLE: str(memory)}
    environ |= {f"HOROVOD_{what}RANK": "0" for what in ("", "LOCAL_", "CROSS_")}
    environ |= {f"HOROVOD_{what}SIZE": "1" for what in ("", "LOCAL_", "CROSS_")}
    # How long a silent peer holds up a collective: Horovod's threads exchange messages all the time.
    environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "10")
    cpus.set_threads(slot.local_size, environ)
    record = ActivityRecord(memory)
    process = subprocess.Popen(command, env=environ, pass_fds=[reading, memory])
    os.close(reading)
    os.close(memory)
    return WorkerProcess(
        process, member, os.pidfd_open(process.pid), writing, record, beats_changed_at=time.monotonic()
    )
