"""The time in which a thread was to run and its core did not run it: a quota, other processes, a stopped process."""

from __future__ import annotations

import contextlib
import os
import threading
import time

MIN_LATE_SECONDS = 0.01  # of a thread that wakes up: Python passes its lock on within 5 ms


class StolenTimeMonitor:
    """Measures the thread that creates it, with the help of another one that calls `sleep` again and again.

    The kernel counts how long a thread waited for a core, quotas of control groups included
    (Documentation/scheduler/sched-stats.rst). It does not count how long a process was stopped (SIGSTOP, as cpulimit
    does it), so the helper's sleep is measured as well: it ends late, and the process used no CPU time meanwhile.
    """

    def __init__(self) -> None:
        self._schedstat: int | None = None
        with contextlib.suppress(OSError):
            self._schedstat = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        self._halted = 0.0  # seconds by the helper's sleep
        self._queued_in_waits = self._wait_begin = 0.0
        self._last_queued, self._last_halted = self._read_queued(), 0.0

    def begin_wait(self) -> None:
        """Begin to poll for another process, which a thread may do without a core as well."""
        self._wait_begin = self._read_queued()

    def end_wait(self) -> None:
        """End what `begin_wait` began."""
        self._queued_in_waits += self._read_queued() - self._wait_begin

    def take(self) -> float:
        """Return the seconds that were stolen since the last call."""
        queued, halted = self._read_queued() - self._queued_in_waits, self._halted
        stolen = max(queued - self._last_queued, halted - self._last_halted)
        self._last_queued, self._last_halted = queued, halted
        return stolen

    def sleep(self, stop: threading.Event, seconds: float) -> bool:
        """Wait up to `seconds` for `stop`, in the helper; return whether it is set."""
        begin, cpu_begin = time.monotonic(), time.process_time()
        if stop.wait(seconds):
            return True
        late = time.monotonic() - begin - seconds
        if late > MIN_LATE_SECONDS:
            # What the process has used of it: it was the other threads that did not let this one run.
            used = max(time.process_time() - cpu_begin - seconds, 0.0)
            self._halted += max(late - used, 0.0)
        return False

    def close(self) -> None:
        """Close what it reads from."""
        if self._schedstat is not None:
            os.close(self._schedstat)
            self._schedstat = None

    def _read_queued(self) -> float:
        """Return the seconds that the thread has waited for a core so far."""
        if self._schedstat is None:
            return 0.0
        return int(os.pread(self._schedstat, 80, 0).split()[1]) / 1e9
