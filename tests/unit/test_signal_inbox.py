"""SignalInbox: signals wait in a list, and wake up whoever waits."""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from hvdtrain.system.processes import Child, Deadline
from hvdtrain.system.signals import SignalInbox


def test_signals_are_kept_in_order_and_wake_up() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with SignalInbox() as inbox:
        assert select.select([inbox], [], [], 0) == ([], [], [])
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert select.select([inbox], [], [], 5) == ([inbox], [], [])
        inbox.clear_wakeups()
        assert select.select([inbox], [], [], 0) == ([], [], [])
        assert list(inbox.received) == [signal.SIGUSR1, signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalInbox() as inbox:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not inbox.received
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_end_of_a_child_wakes_up_and_is_no_signal_received() -> None:
    with SignalInbox(wake_on_child_exit=True) as inbox, Child(["true"]) as child:
        assert select.select([inbox], [], [], 10)[0]
        assert child.wait_for_exit(Deadline(10.0)) == 0
        assert not inbox.received


def test_waiting_ends_with_the_first_signal_or_in_time() -> None:
    with SignalInbox([signal.SIGUSR2]) as inbox:
        begin = time.monotonic()
        assert inbox.wait_for_signal(0.2) is None
        assert 0.19 < time.monotonic() - begin < 5
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        assert inbox.wait_for_signal(30.0) == signal.SIGUSR2
        assert inbox.wait_for_signal(0.0) == signal.SIGUSR2


def test_urgent_signals_are_handled_at_once() -> None:
    handled: list[int] = []
    with SignalInbox([signal.SIGUSR2], on_signal=handled.append) as inbox:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert select.select([inbox], [], [], 5)[0]
        assert handled == [signal.SIGUSR2] and not inbox.received


def test_inboxes_can_be_nested() -> None:
    with SignalInbox() as outer:
        with SignalInbox() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.wait_for_signal(5.0) == signal.SIGTERM
        assert not outer.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.wait_for_signal(5.0) == signal.SIGTERM
