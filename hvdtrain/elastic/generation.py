"""How members form a generation: a fixed set of members that train together, each with a rank.

A generation ends when a member is gone, or when all agree, at the same step, to take newcomers in or to let some leave.
Then each that is left writes to the store that it is here, with the step that its state has reached. When all members
of the last generation are here or gone, the first of them proposes a plan for the next one; others do if it does not.
A plan is written once: all follow the first.

                   put here-N                  plan-N is there
    generation N-1 ----------> waiting for a plan ----------> following it ----------> generation N
                                ^   |                           |    |    all of it
                                |   | the run has ended, or     |    |    put follows-N
                                |   | this member was evicted   |    |
                                |   v                           |    | not in the plan:
                                |  MembershipEnded <------------|----+ evicted, or, if a newcomer, waiting for N+1
                                |                               |
                                +-------------------------------+
                                  one of it is gone, or does not follow within 10 s: waiting for N+1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.elastic.ranks import RankAssignment, assign_ranks, format_assignments, list_whole_replicas
from hvdtrain.elastic.records import (
    BEGAN,
    CANDIDATE,
    DEATH,
    ERROR,
    FOLLOWS,
    GONE,
    PLAN,
    VERDICT,
    Candidate,
    GenerationPlan,
    TrainingError,
)
from hvdtrain.elastic.slot import Slot
from hvdtrain.elastic.store import KeyValueStore
from hvdtrain.elastic.tries import count_tries
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_RESTART, RunError, UserError
from hvdtrain.system.limits import GenerationLimits
from hvdtrain.system.network import interface_address

DEFAULT_LIMITS = GenerationLimits()
EVICTED_TEXT = "evicted: this worker did not respond in time"
INCOMPLETE_TEXT = "another rank of this replica was lost"


class MembershipEnded(Exception):
    """This process is not a member of the run any more and has to end, with this exit code."""

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.exit_code = code


@dataclass(frozen=True)
class MemberRequests:
    """What this member was asked to do, by a signal or by its supervisor."""

    stop: bool = False  # to stop the run
    leave: bool = False  # to leave it
    regroup: bool = False  # to let newcomers in


class GenerationFormer:
    """One member's part in forming generations.

    Attributes:
        replica_ranks: members that hold the model together: they are in a generation all, or none of them is. One whose
            replica lacks a member waits, and has no state any more.
        replica: the members that this one has built its part of the model with, by their places; [] if it has built
            alone. It can be in no generation without them, and ends when one is gone.
    """

    def __init__(
        self, store: KeyValueStore, slot: Slot, member: str, limits: GenerationLimits = DEFAULT_LIMITS
    ) -> None:
        self.store, self.slot, self.member, self.limits = store, slot, member, limits
        self.generation, self._newest_plan = get_newest_plan(store)
        self.has_joined = False  # a generation: this member has a state that others count on
        self.replica_ranks = 1
        self.replica: Sequence[str] = []
        self._servers: list[RendezvousServer] = []  # where the ranks of a generation that it planned meet

    def form_next_generation(self, step: int, poll_requests: Callable[[], MemberRequests]) -> RankAssignment:
        """Form the next generation with whoever is there; return when all of it have said that they follow its plan.

        Args:
            step: the step that this member's state has reached; -1 if it has no state.
            poll_requests: tells what this member is asked to do meanwhile.

        Raises:
            MembershipEnded: the others continued without this member, or the run has ended.
            RunError: the same error came twice at the same step, or the run makes no progress.
        """
        while True:
            number = self.generation + 1
            plan = self._agree_on_plan(number, step, poll_requests)
            self.generation, self._newest_plan = number, plan
            self._stop_stale_servers(plan)
            if plan.error:
                raise RunError(plan.error)
            if self.member not in plan.member_ids:
                if self.has_joined and self.replica_ranks == 1:
                    raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED)
                if self.has_joined and self.replica:
                    raise MembershipEnded(INCOMPLETE_TEXT, EXIT_RESTART)
                self.has_joined, step = False, -1
                continue
            if self._confirm_plan(number, plan.member_ids):
                self.has_joined = True
                return RankAssignment.from_plan(number, plan, self.member)

    def announce_departure(self) -> NoReturn:
        """Publish that this member has left, and raise MembershipEnded."""
        self.store.put(GONE.of(self.member), "left")
        raise MembershipEnded("left, as it was asked to", EXIT_REQUEUE)

    def is_asked_to_end(self, poll_requests: Callable[[], MemberRequests]) -> bool:
        """Return whether this member, which waits for others, is asked to leave or to stop, and has a state to save.

        Raises MembershipEnded if it is asked and has none, and if the run has ended.
        """
        if (verdict := self.store.get(VERDICT)) is not None:
            raise MembershipEnded("the run has ended", verdict.code)
        requests = poll_requests()
        asked = requests.leave or requests.stop
        if asked and not self.has_joined:
            self.announce_departure()
        return asked

    def wait_for_poll(self, began: float) -> None:
        """Wait before the store is asked again: others may train for long, or be too few. began: to wait for them."""
        is_fast = time.monotonic() - began < self.limits.fast_polls
        time.sleep(self.limits.poll if is_fast else 10 * self.limits.poll)

    def check_not_gone(self, gone: Mapping[str, str]) -> None:
        """Raise MembershipEnded if this member is gone, or one that it has built its part of the model with."""
        if self.member in gone:
            raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED)
        if not gone.keys().isdisjoint(self.replica):
            raise MembershipEnded(INCOMPLETE_TEXT, EXIT_RESTART)

    def _agree_on_plan(self, number: int, step: int, poll_requests: Callable[[], MemberRequests]) -> GenerationPlan:
        """Return the plan of a generation; propose it, if this member is the one to.

        A member that is asked to leave or to stop meanwhile leaves, if it has no state. One that has forms a generation
        with those who are there, however few: at the end of a step, they all save.
        """
        store, began, complete_since = self.store, time.monotonic(), None
        mine = Candidate(step, self.slot.host, self.slot.local_rank, self.has_joined)
        store.put(CANDIDATE.of(number, self.member), mine)
        previous = self._newest_plan.member_ids if self._newest_plan is not None else []
        while True:
            if (plan := store.get(PLAN.of(number))) is not None:
                return plan
            asked = self.is_asked_to_end(poll_requests)
            here, gone = store.get_all(CANDIDATE.of(number)), store.get_all(GONE)
            self.check_not_gone(gone)
            present = {member: about for member, about in here.items() if member not in gone}
            complete = self._is_complete(previous, here, gone, time.monotonic() - began)
            line = [member for member in previous if member in present] + sorted(present.keys() - set(previous))
            line = list_whole_replicas(line, present, self.replica_ranks)
            if complete and line and (asked or len(line) >= self.slot.min_members):
                complete_since = complete_since or time.monotonic()
                if line[0] == self.member or time.monotonic() - complete_since > self.limits.proposer:
                    return self._propose_plan(number, line, present)
            self.wait_for_poll(began)

    def _is_complete(
        self, previous: Sequence[str], here: Mapping[str, Candidate], gone: Mapping[str, str], waited: float
    ) -> bool:
        """Whether all are here who may come: the last generation's members, or as many as there are slots."""
        if previous:
            return all(member in here or member in gone for member in previous)
        # horovodrun's newest list lacks slots that could not be filled.
        sizes = [heartbeat.assigned_size for heartbeat in self.store.get_heartbeats().values()]
        return len(here) >= min(sizes, default=self.slot.size) or waited > self.limits.first_plan

    def _propose_plan(self, number: int, line: Sequence[str], present: Mapping[str, Candidate]) -> GenerationPlan:
        """Propose a plan with these members, in this order, and return the plan that all follow."""
        members = assign_ranks(line, {member: candidate.host for member, candidate in present.items()})
        address = get_own_address(self.slot.interface, self.slot.address)
        columns = [
            [member.host for member in members[place :: self.replica_ranks]] for place in range(self.replica_ranks)
        ]
        servers = [RendezvousServer(address, format_assignments(hosts)) for hosts in columns]
        steps = [present[member.id].step for member in members]
        step, meeting = max(steps), [(address, server.port) for server in servers]
        plan = GenerationPlan(members, meeting, steps.index(step), step, self._find_give_up_reason())
        chosen = self.store.put_if_absent(PLAN.of(number), plan)
        for server in servers if chosen != plan else self._servers:
            server.stop_serving()
        if chosen == plan:
            self._servers = servers
        return chosen

    def _stop_stale_servers(self, plan: GenerationPlan) -> None:
        """Stop this member's servers of an earlier generation, unless the plan uses them."""
        if [(server.server_address[0], server.port) for server in self._servers] != plan.servers:
            for server in self._servers:
                server.stop_serving()
            self._servers = []

    def _confirm_plan(self, number: int, names: Sequence[str]) -> bool:
        """Whether all members of a plan say in time that they follow it: else some are gone, and there is another."""
        self.store.put(FOLLOWS.of(number, self.member), True)
        deadline = time.monotonic() + self.limits.follow
        while time.monotonic() < deadline:
            if len(self.store.get_all(FOLLOWS.of(number))) == len(names):
                return True
            if set(names) & set(self.store.get_all(GONE)):
                return False
            time.sleep(self.limits.poll)
        return False

    def _find_give_up_reason(self) -> str | None:
        """Why there is to be no further generation, or None."""
        errors = self.store.get_all(ERROR)
        tries = count_tries(self.store.get_all(DEATH), errors, self.store.get_all(BEGAN))
        return find_repeated_error(errors) or (f"no progress: {tries.text}" if tries.should_give_up else None)


def find_repeated_error(errors: Mapping[str, TrainingError]) -> str | None:
    """Return why a run with these errors, by `GENERATION-MEMBER`, is given up: one came in two generations; or None."""
    reports: dict[tuple[int, str], set[str]] = {}  # by step and text: the generations in which it was reported
    for key, error in errors.items():
        reports.setdefault((error.step, error.text), set()).add(key.partition("-")[0])
    twice = [(step, text) for (step, text), generations in reports.items() if len(generations) > 1]
    return f"the same error came twice at step {twice[0][0]}: {twice[0][1]}" if twice else None


def get_newest_plan(store: KeyValueStore) -> tuple[int, GenerationPlan | None]:
    """Return the newest generation's number and plan; 0 and None if there is none yet."""
    plans = store.get_all(PLAN)
    newest = max((int(number) for number in plans), default=0)
    return newest, plans.get(str(newest))


def get_own_address(interface: str, fallback: str) -> str:
    """Return this host's IPv4 address on an interface; `fallback` if it has none."""
    try:
        return interface_address(interface)
    except UserError:
        return fallback
