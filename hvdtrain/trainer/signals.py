"""Being asked to stop, to leave or to regroup: a flag is set, and all ranks act together at the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.elastic.membership import Membership
from hvdtrain.step import TOLD

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Places among what ranks tell each other in a step: how many of them were asked to stop the run, to leave it, to
# regroup; how many ids they fed to the model, and the sum of these ids' hashes; and by rank 0, which writes: up to
# which step the ledger is on disk for good, and how many rows of metrics.jsonl are not, for want of room.
STOP, LEAVING, REGROUP, FED, HASHES, KEPT, HELD = range(TOLD)


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGUSR1 ask for a stop; a second SIGINT interrupts at once.

    In an elastic run SIGTERM and SIGINT mean this rank alone, which leaves the others; SIGUSR1 stops them all. What the
    rank's supervisor says counts as well.

    In a thread other than the main one, which cannot take signals, it never asks.
    """

    def __init__(self, membership: Membership | None = None) -> None:
        self.membership = membership
        self.requested = False
        self._before: dict[int, Any] = {}

    def tell(self) -> NDArray[np.float64]:
        """(TOLD,) what this rank tells the others of it in a step."""
        told = np.zeros(TOLD)
        told[STOP] = self.requested
        if self.membership is not None:
            self.membership.hear()
            told[[STOP, LEAVING, REGROUP]] += self.membership.asked()
        return told

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.membership is not None and number != signal.SIGUSR1:
            self.membership.leaving = True
        else:
            self.requested = True
            if self.membership is not None:
                self.membership.stopping = True  # it may be waiting for others

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
