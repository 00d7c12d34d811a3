"""Signals to `hvdtrain launch`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from hvdtrain.system.errors import EXIT_REQUEUE, RequeueExit
from hvdtrain.system.signals import SignalInbox


@contextlib.contextmanager
def exit_75_on_usr1() -> Iterator[None]:
    """While nothing runs yet, have SIGUSR1, which batch systems send ahead of the end, end this process with 75."""

    def raise_requeued(*_: object) -> None:
        raise RequeueExit(EXIT_REQUEUE)

    before = signal.signal(signal.SIGUSR1, raise_requeued)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def catch_stop_signals() -> SignalInbox:
    """Return an inbox for the signals that stop a job; it also wakes when the job ends."""
    return SignalInbox(wake_on_child_exit=True)
