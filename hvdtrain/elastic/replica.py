"""How workers meet that build their parts of a model together, before any of them is in a generation.

    put here-0 --> waiting --> all follow it --> building, as a world of one replica --> candidates of a generation
                      |            |                        |                                    |
         the first place: all are  |                        | one of them is lost                |
         here; put replica-MEMBER  +------------------------+------------------------------------+
                                                            v
                              MembershipEnded: the others end, too, and their supervisors start all of them again

DTensors and FSDP2 know the ranks of their process group by number only. So a replica stays as it was built: a world
connects the same workers again, at the same places, or does without the replica.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.elastic.generation import (
    INCOMPLETE_TEXT,
    GenerationFormer,
    MemberRequests,
    MembershipEnded,
    get_own_address,
)
from hvdtrain.elastic.ranks import list_whole_replicas
from hvdtrain.elastic.records import CANDIDATE, FOLLOWS, GONE, REPLICA, Candidate, ReplicaPlan
from hvdtrain.system.errors import EXIT_RESTART

MEETING = 0  # the number of no generation


class ReplicaMeeting:
    """One worker's part in the meeting of a replica."""

    def __init__(self, former: GenerationFormer) -> None:
        self.former, self.store = former, former.store
        self._server: RendezvousServer | None = None  # where the replica meets, if this worker planned it

    def meet(self, poll_requests: Callable[[], MemberRequests]) -> ReplicaPlan:
        """Wait until all workers of this one's replica are there and know it; return who they are.

        poll_requests: tells what this worker is asked to do meanwhile.

        Raises:
            MembershipEnded: the run has ended, this worker was asked to leave, or one of the replica is lost.
        """
        former, slot, began = self.former, self.former.slot, time.monotonic()
        self.store.put(CANDIDATE.of(MEETING, former.member), Candidate(-1, slot.host, slot.local_rank, False))
        while True:
            former.is_asked_to_end(poll_requests)
            gone, replicas = self.store.get_all(GONE), self.store.get_all(REPLICA)
            former.check_not_gone(gone)
            own = next((plan for plan in replicas.values() if former.member in plan.members), None)
            if own is None and slot.local_rank % former.replica_ranks == 0:
                own = self._propose({*gone, *(member for plan in replicas.values() for member in plan.members)})
            if own is not None:
                former.replica = own.members
                self._confirm(own)
                return own
            former.wait_for_poll(began)

    def close(self) -> None:
        """Stop serving, if this worker does."""
        if self._server is not None:
            self._server.stop_serving()

    def _propose(self, taken: set[str]) -> ReplicaPlan | None:
        """Plan this worker's replica, if all places have a worker that is not taken."""
        former, slot = self.former, self.former.slot
        waiting = {m: about for m, about in self.store.get_all(CANDIDATE.of(MEETING)).items() if m not in taken}
        whole = list_whole_replicas(sorted(waiting), waiting, former.replica_ranks)
        if former.member not in whole:
            return None
        first, address = whole.index(former.member), get_own_address(slot.interface, slot.address)
        self._server = RendezvousServer(address, {})
        members = whole[first : first + former.replica_ranks]
        return self.store.put_if_absent(REPLICA.of(former.member), ReplicaPlan(members, (address, self._server.port)))

    def _confirm(self, plan: ReplicaPlan) -> None:
        """Wait until all workers of a replica know the plan. Raises MembershipEnded if one does not in time."""
        former = self.former
        self.store.put(FOLLOWS.of(MEETING, former.member), True)
        deadline = time.monotonic() + former.limits.follow
        while not self.store.get_all(FOLLOWS.of(MEETING)).keys() >= set(plan.members):
            former.check_not_gone(self.store.get_all(GONE))
            if time.monotonic() > deadline:
                raise MembershipEnded(INCOMPLETE_TEXT, EXIT_RESTART)
            time.sleep(former.limits.poll)
