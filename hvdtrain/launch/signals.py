"""Signals to `hvdtrain launch`: caught, and acted on where it waits."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from hvdtrain.system.errors import EXIT_REQUEUE, RequeueExit
from hvdtrain.system.signals import ignores_hangup

SignalInbox = tuple[list[int], int]


@contextlib.contextmanager
def exit_75_on_usr1() -> Iterator[None]:
    """While nothing runs yet, SIGUSR1, which batch systems send ahead of the end, ends this process with 75."""

    def raise_requeued(*_: object) -> None:
        raise RequeueExit(EXIT_REQUEUE)

    before = signal.signal(signal.SIGUSR1, raise_requeued)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[SignalInbox]:
    """Catch the signals that stop: a list that they are added to, and a file to read when one came or a child ended."""
    received: list[int] = []
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    handlers = {
        signal.SIGINT: lambda number, _: received.append(number),
        signal.SIGTERM: lambda number, _: received.append(number),
        signal.SIGUSR1: lambda number, _: received.append(number),  # what batch systems send ahead of the end
        signal.SIGHUP: lambda number, _: received.append(number),  # the terminal is closed
        signal.SIGCHLD: lambda number, _: None,
    }
    if ignores_hangup():
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    wakeup = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        yield received, woken
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(woken)
        os.close(wake)
