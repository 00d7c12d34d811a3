"""Signals to `hvdtrain launch`."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from hvdtrain.system.errors import EXIT_REQUEUE, RequeueExit
from hvdtrain.system.signals import SignalInbox


class RequeueRequest:
    """While entered, SIGUSR1, which batch systems send ahead of the end, ends this process with 75: nothing runs yet.

    The signal raises RequeueExit wherever this process is. A library that is imported just then may swallow that, as
    some do around optional imports: call `raise_if_received` after foreign code.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None  # whatever signal.signal has returned

    def __enter__(self) -> RequeueRequest:
        self._previous = signal.signal(signal.SIGUSR1, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        self.raise_if_received()

    def raise_if_received(self) -> None:
        """Raise RequeueExit if the signal came."""
        if self._received:
            raise RequeueExit(EXIT_REQUEUE)


def catch_stop_signals() -> SignalInbox:
    """Return an inbox for the signals that stop a job; it also wakes when the job ends."""
    return SignalInbox(wake_on_child_exit=True)
