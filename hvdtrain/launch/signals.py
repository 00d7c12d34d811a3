"""Signals to `hvdtrain launch`."""

from __future__ import annotations

import signal

from hvdtrain.system.errors import EXIT_REQUEUE, RequeueExit
from hvdtrain.system.signals import SignalInbox


class RequeueRequest(SignalInbox):
    """While entered, SIGUSR1, which batch systems send ahead of the end, ends this process with 75: nothing runs yet.

    The signal raises RequeueExit wherever this process is. A library that is imported just then may swallow that, as
    some do around optional imports: call `raise_if_received` after foreign code.
    """

    def __init__(self) -> None:
        super().__init__([signal.SIGUSR1], on_signal=self._receive)

    def _receive(self, number: int) -> None:
        self.received.append(number)
        self.raise_if_received()

    def raise_if_received(self) -> None:
        """Raise RequeueExit if the signal came."""
        if self.received:
            raise RequeueExit(EXIT_REQUEUE)


def catch_stop_signals() -> SignalInbox:
    """Return an inbox for the signals that stop a job; it also wakes when the job ends."""
    return SignalInbox(wake_on_child_exit=True)
