"""Signals that stop processes: what all processes of hvdtrain agree on about them, and how they wait for one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, TypeVar

from hvdtrain.system.processes import Deadline

# A launcher, or timeout(1), may send a signal to a process and again to its group, and Slurm sends two: those that come
# within so many seconds after the first one are the same stop.
SAME_STOP_SECONDS = 1.0
# Ctrl-C, an end, what batch systems send ahead of the end, a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
Inbox = TypeVar("Inbox", bound="SignalInbox")


def ignores_hangup() -> bool:
    """Return whether nohup, or whoever started this process, wants it to outlive its terminal."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


class SignalInbox:
    """While entered, signals are put into a list, and a file descriptor becomes readable when one came.

        with SignalInbox() as inbox:
            select.select([inbox, pipe], [], [], 1.0)
            inbox.clear_wakeups()
            while inbox.received:
                handle(inbox.received.popleft())

    SIGHUP stays ignored if it was (nohup). To be entered in the main thread, the only one that gets signals.

    Attributes:
        received: the signals that came, oldest first; whoever acts on one takes it out.
    """

    def __init__(
        self,
        signals: Iterable[int] = STOP_SIGNALS,
        *,
        wake_on_child_exit: bool = False,
        on_signal: Callable[[int], None] | None = None,
    ) -> None:
        """Say what to catch.

        Args:
            signals: their numbers.
            wake_on_child_exit: whether the descriptor also becomes readable when a child process ends.
            on_signal: called with a signal's number as soon as it comes, instead of putting it into `received`; for
                what cannot wait until this process looks.
        """
        self.received: deque[int] = deque()
        self._signals, self._wake_on_child_exit = list(signals), wake_on_child_exit
        self._handle = on_signal or self.received.append
        self._previous_handlers: dict[int, Any] = {}  # Any: whatever signal.signal has returned
        self._previous_wakeup_fd = -1
        self._readable = self._writable = -1

    def __enter__(self: Inbox) -> Inbox:
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._readable, False)
        os.set_blocking(self._writable, False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        for number in self._signals:
            if number != signal.SIGHUP or not ignores_hangup():
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
        if self._wake_on_child_exit:
            self._previous_handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        os.close(self._readable)
        os.close(self._writable)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._handle(number)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable, for `select` and selectors."""
        return self._readable

    def clear_wakeups(self) -> None:
        """Make the descriptor unreadable until the next signal comes; `received` stays as it is."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._readable, 4096):
                pass

    def wait_for_signal(self, seconds: float) -> int | None:
        """Return the first signal that was received, or is within `seconds`; leave it in `received`."""
        deadline = Deadline(seconds)
        while not self.received and not deadline.expired:
            if select.select([self], [], [], deadline.left())[0]:
                self.clear_wakeups()
        return self.received[0] if self.received else None


def describe_deadly_signal(number: int) -> str:
    """Return `signal 9 (SIGKILL)`, and what the cause of a process's end by it probably was, if that is known."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = "unknown"
    hint = "; probably by the out-of-memory killer" if number == signal.SIGKILL else ""
    return f"signal {number} ({name}){hint}"
