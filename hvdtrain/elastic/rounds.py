"""A slot's part in horovodrun's rounds of assignment.

In a round horovodrun compares its list of slots with the hosts that the discovery script names: it starts processes in
new slots, and answers those of a removed host with rank -1. A round ends when all slots of the list have asked for
their ranks, so an answer may take as long as a slot that never asks: a thread waits for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from hvdtrain.elastic.slot import Slot
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable


class AssignmentRounds:
    """Takes part in rounds for one slot.

    Attributes:
        assigned_size: how many slots horovodrun's list had when this slot was last answered.
        is_removed: the list is without this slot now; it takes part in no further round.
        is_suspended: this slot takes part in none, so that horovodrun notices that it is gone.
    """

    def __init__(self, store: KeyValueStore, slot: Slot, on_removal: Callable[[], object]) -> None:
        """Begin with no round. on_removal is called in another thread when the list is without this slot."""
        self.store, self.slot, self.on_removal = store, slot, on_removal
        self.assigned_size = slot.size
        self.is_removed = self.is_suspended = False
        self._answered_round = 0
        self._thread: threading.Thread | None = None  # waits for horovodrun's answer

    def answer_newest(self) -> None:
        """Take part in horovodrun's newest round, if this slot has not yet."""
        if not self.is_suspended and not self.is_removed and (newest := self.find_unanswered()):
            self._answered_round = newest
            self._thread = threading.Thread(target=self._fetch_assignment, daemon=True)
            self._thread.start()

    def find_unanswered(self) -> int:
        """Return the newest round, or 0 if this slot has taken part in it or still waits in an earlier one."""
        if self._thread is not None and self._thread.is_alive():
            return 0
        newest = self.store.get_newest_round()
        return newest if newest > self._answered_round else 0

    def wait_for_answer(self, seconds: float) -> None:
        """Wait until the round that this slot takes part in is over."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _fetch_assignment(self) -> None:
        with contextlib.suppress(StoreUnreachable):
            rank, size = self.store.wait_for_assignment(self.slot.host, self.slot.local_rank)
            # All slots were answered at once, whichever round each of them was in.
            self._answered_round = self.store.get_newest_round()
            if rank >= 0:
                self.assigned_size = size
            else:
                self.is_removed = True
                self.on_removal()
