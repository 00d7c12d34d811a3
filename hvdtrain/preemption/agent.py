"""The agent of a host: keeps it in the membership folder, and marks it there as draining after a preemption notice.

LIVE -- notice --> DRAINING -- sooner notice --> DRAINING
  |                   |
  +-- SIGTERM, SIGINT, SIGHUP, or the deadline of a source that exits then --> deregistered
"""

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
    DrainNotice,
    HostRecord,
    drain_notice_path,
    read_drain_notice,
    read_host_record,
    remove_host_record,
    write_drain_notice,
    write_host_record,
)
from hvdtrain.preemption.source import Notice, NoticeSource
from hvdtrain.preemption.watcher import SourceWatcher, log_agent_message
from hvdtrain.system.errors import UserError
from hvdtrain.system.signals import SAME_STOP_SECONDS, ignores_hangup

NOTICE_RETRY_INTERVAL = 1.0  # seconds after which a notice that could not be written is written again


@dataclass(frozen=True)
class AgentConfig:
    """A host, and where its agent registers it."""

    folder: Path  # the membership folder
    name: str
    slots: int
    boot_id: str  # names this life of the host
    source: str  # the name of the notice source
    interval: float  # seconds between heartbeats


class Agent:
    """Sends heartbeats until it is told to end; from the first notice on as a draining host."""

    def __init__(self, config: AgentConfig, source: NoticeSource) -> None:
        self.config, self.source = config, source
        # Filled by signal handlers, which SimpleQueue allows, and by the thread that polls the source. None: end.
        self._inbox: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._started = time.time()
        self._heartbeats = 0
        self._draining: DrainNotice | None = None
        self._noticed_at = 0.0  # by the monotonic clock, as is _exit_at
        self._exit_at: float | None = None
        self._reported: set[str] = set()

    def run_agent(self) -> None:
        """Register the host; return when it is deregistered."""
        for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *self.source.notice_signals}:
            if number != signal.SIGHUP or not ignores_hangup():
                signal.signal(number, self._on_signal)
        self._resume_draining()
        if self.source.poll_interval > 0:
            watcher = SourceWatcher(self.source, self.config.source, self._inbox.put)
            threading.Thread(target=watcher.watch, daemon=True).start()
        self._write_heartbeat()
        while self._wait_until_heartbeat(time.monotonic() + self._heartbeat_interval()):
            self._write_heartbeat()
        try:
            remove_host_record(self.config.folder, self.config.name, self.config.boot_id, os.getpid())
        except OSError as error:
            self._report_once(error)

    def _heartbeat_interval(self) -> float:
        return self.config.interval if self._draining is None else min(self.config.interval, NOTICE_RETRY_INTERVAL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number not in self.source.notice_signals:
            self._inbox.put(None)
        elif self._draining is None:
            self._inbox.put(Notice(signal.Signals(number).name, self.source.grace))
        elif (
            number == signal.SIGTERM
            and not self.source.exits_at_deadline  # Slurm sends it again at the end of its grace
            and time.monotonic() - self._noticed_at > SAME_STOP_SECONDS
        ):
            self._inbox.put(None)

    def _resume_draining(self) -> None:
        """Continue draining if this life of the host has had a notice; remove a notice for an earlier life."""
        try:
            left = read_drain_notice(self.config.folder, self.config.name)
            if left is not None and left.boot_id == self.config.boot_id:
                self._start_draining(left, max(0.0, left.deadline - time.time()))
                path = drain_notice_path(self.config.folder, self.config.name)
                log_agent_message(
                    f"{left.host} is still draining ({left.source}: {left.reason}); "
                    f"to cancel, stop this agent and delete {path}"
                )
            else:
                drain_notice_path(self.config.folder, self.config.name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--membership {self.config.folder}: {error.strerror}") from None

    def _wait_until_heartbeat(self, until: float) -> bool:
        """Wait for notices until the next heartbeat is due, or one is to be written now; return False to end."""
        while True:
            now = time.monotonic()
            if self._exit_at is not None and now >= self._exit_at:
                return False
            try:
                limit = until if self._exit_at is None else min(until, self._exit_at)
                message = self._inbox.get(timeout=max(0.0, limit - now))
            except queue.Empty:
                if time.monotonic() >= until:
                    return True
                continue
            if message is None:
                return False
            if self._accept_notice(message):
                return True  # and write it now

    def _accept_notice(self, notice: Notice) -> bool:
        """Drain by this notice and return True, unless there is one already that leaves no more time."""
        deadline = time.time() + notice.seconds
        if self._draining is not None and deadline > self._draining.deadline - 1.0:
            return False
        host = self.config
        draining = DrainNotice(host.name, host.boot_id, deadline, notice.seconds, host.source, notice.reason)
        self._start_draining(draining, notice.seconds)
        log_agent_message(f"{host.name} will be preempted in {notice.seconds:.0f} s ({host.source}: {notice.reason})")
        return True

    def _start_draining(self, draining: DrainNotice, seconds: float) -> None:
        self._draining, self._noticed_at = draining, time.monotonic()
        if self.source.exits_at_deadline:
            self._exit_at = self._noticed_at + seconds

    def _write_heartbeat(self) -> None:
        """Write a heartbeat; and the notice, if its file does not hold it."""
        host = self.config
        try:
            if self._draining is not None and read_drain_notice(host.folder, host.name) != self._draining:
                write_drain_notice(host.folder, self._draining)
            there = read_host_record(host.folder, host.name)
            if self._heartbeats and there is not None and (there.boot_id, there.pid) != (host.boot_id, os.getpid()):
                self._report_once(
                    f"another agent, process {there.pid}, also writes {host.name}.json: give each its own --host"
                )
            self._heartbeats += 1
            state = "live" if self._draining is None else "draining"
            member = HostRecord(
                host.name, host.slots, host.boot_id, os.getpid(), self._started, self._heartbeats, state
            )
            write_host_record(host.folder, member)
        except OSError as error:
            self._report_once(error)

    def _report_once(self, problem: OSError | str) -> None:
        """Print each problem once."""
        text = problem if isinstance(problem, str) else f"{self.config.folder}: {problem.strerror}; retrying"
        if text not in self._reported:
            self._reported.add(text)
            log_agent_message(text)
