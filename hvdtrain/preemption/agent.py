"""The agent of a host: keeps it in the membership folder, and says there when it is about to go."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hvdtrain.preemption.membership_folder import (
    Draining,
    Member,
    draining_path,
    read_draining,
    read_member,
    remove_member,
    write_draining,
    write_member,
)
from hvdtrain.preemption.notices import Notice, Source, say, watch
from hvdtrain.system.errors import UserError
from hvdtrain.system.signals import SAME_STOP, ignores_hangup

# Which signals are a notice; under the others they end the agent, or mean nothing.
NOTICES = {
    "signal": (signal.SIGTERM, signal.SIGUSR1),
    "slurm": (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1),
}
RETRY = 1.0  # seconds after which a notice that could not be written is tried again


@dataclass(frozen=True)
class Host:
    """What an agent is for. `source` is the name of what gives notices; boot_id names this life of the host."""

    folder: Path
    name: str
    slots: int
    boot_id: str
    source: str
    grace: float
    interval: float


class Agent:
    """Heartbeats until told to end; from the first notice on as a draining host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        # Put into by signal handlers, which SimpleQueue allows, and by the thread that watches the source.
        self._inbox: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._started = time.time()
        self._beat = 0
        self._draining: Draining | None = None
        self._noticed = 0.0  # by the monotonic clock, as is
        self._ends: float | None = None
        self._told: set[str] = set()

    def run(self, source: Source | None) -> None:
        """Return when the host is deregistered."""
        for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *NOTICES.get(self.host.source, ())}:
            if number != signal.SIGHUP or not ignores_hangup():
                signal.signal(number, self._on_signal)
        self._adopt()
        if source is not None:
            watcher = threading.Thread(target=watch, args=(source, self._inbox.put, self.host.source), daemon=True)
            watcher.start()
        self._write()
        while self._listen(time.monotonic() + self._pause()):
            self._write()
        try:
            remove_member(self.host.folder, self.host.name, self.host.boot_id, os.getpid())
        except OSError as error:
            self._tell(error)

    def _pause(self) -> float:
        return self.host.interval if self._draining is None else min(self.host.interval, RETRY)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number not in NOTICES.get(self.host.source, ()):
            self._inbox.put(None)
        elif self._draining is None:
            reason = signal.Signals(number).name
            self._inbox.put(Notice(self.host.source, reason, self.host.grace))
        elif (
            number == signal.SIGTERM
            and self.host.source != "slurm"  # which sends it again at the end of its grace
            and time.monotonic() - self._noticed > SAME_STOP
        ):
            self._inbox.put(None)

    def _adopt(self) -> None:
        """Go on draining if this life of the host was told to go; a notice for an earlier one is taken away."""
        try:
            left = read_draining(self.host.folder, self.host.name)
            if left is not None and left.boot_id == self.host.boot_id:
                self._drain(left, max(0.0, left.deadline - time.time()))
                path = draining_path(self.host.folder, self.host.name)
                say(f"{left.host} is still draining ({left.source}: {left.reason}); if not so, end me, remove {path}")
            else:
                draining_path(self.host.folder, self.host.name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--membership {self.host.folder}: {error.strerror}") from None

    def _listen(self, until: float) -> bool:
        """Wait until the next heartbeat for what comes in; False to end."""
        while True:
            now = time.monotonic()
            if self._ends is not None and now >= self._ends:
                return False
            try:
                limit = until if self._ends is None else min(until, self._ends)
                message = self._inbox.get(timeout=max(0.0, limit - now))
            except queue.Empty:
                if time.monotonic() >= until:
                    return True
                continue
            if message is None:
                return False
            if self._take(message):
                return True  # and write it now

    def _take(self, notice: Notice) -> bool:
        """Drain by this notice, unless there is one already that gives no more time."""
        deadline = time.time() + notice.seconds
        if self._draining is not None and deadline > self._draining.deadline - 1.0:
            return False
        host = self.host
        draining = Draining(host.name, host.boot_id, deadline, notice.seconds, notice.source, notice.reason)
        self._drain(draining, notice.seconds)
        say(f"{host.name} is to go in {notice.seconds:.0f} s ({notice.source}: {notice.reason})")
        return True

    def _drain(self, draining: Draining, seconds: float) -> None:
        self._draining, self._noticed = draining, time.monotonic()
        if self.host.source == "slurm":  # which ends the allocation then, and not the host
            self._ends = self._noticed + seconds

    def _write(self) -> None:
        """One heartbeat; and the notice, if it is not there."""
        host = self.host
        try:
            if self._draining is not None and read_draining(host.folder, host.name) != self._draining:
                write_draining(host.folder, self._draining)
            there = read_member(host.folder, host.name)
            if self._beat and there is not None and (there.boot_id, there.pid) != (host.boot_id, os.getpid()):
                self._tell(f"another agent, process {there.pid}, also writes {host.name}.json: give each its --host")
            self._beat += 1
            state = "live" if self._draining is None else "draining"
            member = Member(host.name, host.slots, host.boot_id, os.getpid(), self._started, self._beat, state)
            write_member(host.folder, member)
        except OSError as error:
            self._tell(error)

    def _tell(self, trouble: OSError | str) -> None:
        """Say each trouble once."""
        text = trouble if isinstance(trouble, str) else f"{self.host.folder}: {trouble.strerror}; trying on"
        if text not in self._told:
            self._told.add(text)
            say(text)
