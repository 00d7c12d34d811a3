"""Being asked to stop, to leave or to regroup: a flag is set, and all ranks act together at the end of the step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from hvdtrain.elastic.membership import Membership
from hvdtrain.recipe.framework import StepVotes
from hvdtrain.system.signals import SAME_STOP_SECONDS, ignores_hangup

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """While entered, SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for a stop; a second SIGINT interrupts at once.

    A SIGINT within a second of another signal is the same stop. SIGHUP means that the terminal was closed; nohup lets
    it be ignored, and so it stays then. In an elastic run SIGUSR1 stops all ranks, and the others mean this rank alone,
    which leaves. What the rank's supervisor says counts as well.

    In a thread other than the main one, which cannot take signals, it never asks.
    """

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.requested = False
        self._requested_at = 0.0  # when, by the monotonic clock
        self._previous_handlers: dict[int, Any] = {}

    def collect_votes(self) -> StepVotes:
        """Return this rank's votes, by what it was asked to do so far."""
        requests = self.membership.poll_requests()
        return StepVotes(stop=int(requests.stop), leave=int(requests.leave), regroup=int(requests.regroup))

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or not ignores_hangup():
                    self._previous_handlers[number] = signal.signal(number, self._handle_signal)
        return self

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._requested_at > SAME_STOP_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self._requested_at = now
        if number == signal.SIGUSR1:
            self.membership.request_stop()
        else:
            self.membership.request_leave()
        self.requested = self.membership.stop_requested

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
