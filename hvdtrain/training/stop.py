"""Requests to stop the run or to leave it: all ranks learn of them in the next step, and act together at its end."""

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
    """While entered, signals are requests to this rank, which become votes in the next step.

    SIGUSR1                    stop the run
    SIGTERM, SIGINT, SIGHUP    fixed membership: stop the run; elastic: leave it, and the others continue
    a second SIGINT            after a stop was requested: KeyboardInterrupt at once

    A SIGINT within a second of another signal counts as the same request. SIGHUP means that the terminal was closed;
    nohup makes the process ignore it, and then it stays ignored. Requests of an elastic rank's supervisor are votes as
    well. In a thread other than the main one, which cannot handle signals, they are the only ones.
    """

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.requested = False
        self._requested_at = 0.0  # by the monotonic clock
        self._previous_handlers: dict[int, Any] = {}

    def collect_votes(self) -> StepVotes:
        """Return votes for what this rank was asked to do so far."""
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
