"""Being asked to stop, to leave or to regroup: a flag is set, and all ranks act together at the end of the step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.elastic.membership import Membership
from hvdtrain.recipe.framework import TOLD
from hvdtrain.system.signals import SAME_STOP_SECONDS, ignores_hangup

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Places among what ranks tell each other in a step: how many of them were asked to stop the run, to leave it, to
# regroup; how many ids they fed to the model, and the sum of these ids' hashes; and by rank 0, which writes: up to
# which step the ledger is on disk for good, and how many rows of metrics.jsonl are not, for want of room.
STOP, LEAVING, REGROUP, FED, HASHES, KEPT, HELD = range(TOLD)


class StopRequest:
    """While entered, SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for a stop; a second SIGINT interrupts at once.

    A SIGINT within a second of another signal is the same stop. SIGHUP means that the terminal was closed; nohup lets
    it be ignored, and so it stays then. In an elastic run SIGUSR1 stops all ranks, and the others mean this rank alone,
    which leaves. What the rank's supervisor says counts as well.

    In a thread other than the main one, which cannot take signals, it never asks.
    """

    def __init__(self, membership: Membership | None = None) -> None:
        self.membership = membership
        self.requested = False
        self._requested_at = 0.0  # when, by the monotonic clock
        self._previous_handlers: dict[int, Any] = {}

    def collect_votes(self) -> NDArray[np.float64]:
        """(TOLD,) what this rank tells the others of it in a step."""
        told = np.zeros(TOLD)
        told[STOP] = self.requested
        if self.membership is not None:
            self.membership.poll_supervisor()
            told[[STOP, LEAVING, REGROUP]] += self.membership.get_requests()
        return told

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
        if self.membership is not None and number != signal.SIGUSR1:
            self.membership.leave_requested = True
        else:
            self.requested = True
            if self.membership is not None:
                self.membership.stop_requested = True  # it may be waiting for others

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
