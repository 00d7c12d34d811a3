"""What one supervisor, that of the first member that works, does for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hvdtrain.elastic.peers import Peers
from hvdtrain.elastic.ranks import list_whole_replicas
from hvdtrain.elastic.records import CANDIDATE, GenerationPlan
from hvdtrain.elastic.store import KeyValueStore
from hvdtrain.system.limits import SupervisorLimits


class Leader:
    """Calls rounds of assignment, and has the members regroup when newcomers are ready."""

    def __init__(self, store: KeyValueStore, limits: SupervisorLimits) -> None:
        self.store, self.limits = store, limits
        self._round_began_at = time.monotonic()
        self._newcomer_since: float | None = None  # when a newcomer was first ready for the next generation
        self._regrouped_generation = 0  # the last that was asked to regroup

    @staticmethod
    def choose(members: Sequence[str], peers: Peers) -> str:
        """Return the member whose supervisor leads: the first of the newest generation that works, or any that does."""
        working = (peers.alive - peers.gone) or peers.alive
        return next((member for member in members if member in working), min(working))

    def announce_round_if_due(self) -> None:
        """Call all slots to a round.

        Also while this slot waits for an answer itself: that may be for a slot which has answered all earlier rounds.
        """
        if time.monotonic() - self._round_began_at >= self.limits.round_interval:
            self._round_began_at = time.monotonic()
            self.store.announce_round(self.store.get_newest_round() + 1)

    def regroup_for_newcomers(
        self, generation: int, plan: GenerationPlan | None, peers: Peers, request: Callable[[], object]
    ) -> None:
        """Call `request`, once a generation, when newcomers are ready and no other one is starting, or none in time.

        In a grid, newcomers are ready when they are a whole replica; those that lack a member wait.
        """
        members = plan.member_ids if plan is not None else []
        candidates = self.store.get_all(CANDIDATE.of(generation + 1))
        waiting = sorted(member for member in candidates if member not in peers.gone and member not in members)
        ready = set(list_whole_replicas(waiting, candidates, plan.replica_ranks)) if plan is not None else set()
        if not members or not ready or self._regrouped_generation == generation:
            self._newcomer_since = None
            return
        starting = {member for member in peers.alive if member not in members and member not in peers.gone}
        starting -= set(waiting)
        self._newcomer_since = self._newcomer_since or time.monotonic()
        if not starting or time.monotonic() - self._newcomer_since > self.limits.join_grace:
            self._regrouped_generation = generation
            request()
