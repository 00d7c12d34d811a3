"""A worker's membership in an elastic run: how members become a generation, with ranks, and how it ends.

A generation is a fixed set of members that train together. It ends when a member is gone, or when all agree, at the
same step, to take newcomers in or to let some leave. Then each that is left writes on the board that it is here, with
the step that it has reached; when all of the last generation are here or gone, the first of them proposes a plan for
the next one. A plan is a fact: all follow the first.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.elastic.ranks import RankAssignment, assign_ranks, format_assignments
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
    Verdict,
)
from hvdtrain.elastic.slot import MEMBER_VARIABLE, Request, Slot, read_requests
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable
from hvdtrain.elastic.tries import count_tries
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, RecipeError, RunError, UserError
from hvdtrain.system.network import interface_address

PLAN_POLL_INTERVAL = 0.02  # seconds
FAST_POLL_SECONDS = 10.0  # seconds that it polls so often
FOLLOW_TIMEOUT = 10.0  # seconds for all of a plan to say that they follow it
FIRST_PLAN_TIMEOUT = 60.0  # seconds that the first generation waits for slots that do not come
EVICTED_TEXT = "the others went on without this member: it was frozen, or out of reach"
PROPOSER_TIMEOUT = 1.0  # seconds after which another proposes a plan if the first in line does not


class MembershipEnded(Exception):
    """This member is none any more, and its process has to end, with this exit code."""

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.exit_code = code


class Membership:
    """This worker's membership."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.slot, self.member, self.requests_fd = Slot.from_worker_environment(environ)
        self.store = KeyValueStore(self.slot.address, self.slot.port)
        os.set_blocking(self.requests_fd, False)
        self.generation = get_newest_plan(self.store)[0]
        self.has_joined = False
        self.leave_requested = self.stop_requested = self.regroup_requested = False
        self.server: RendezvousServer | None = None
        self.formation_text = ""  # how long the last generation took to form, for people

    @property
    def change_count(self) -> int:
        """How often the members have changed."""
        return self.generation - 1

    def poll_supervisor(self) -> None:
        """Take in what the supervisor has said: `leaving`, `stopping` and `regrouping`. Costs microseconds."""
        requests = read_requests(self.requests_fd)
        self.leave_requested |= Request.LEAVE in requests
        self.regroup_requested |= Request.REGROUP in requests
        self.stop_requested |= Request.STOP in requests

    def get_requests(self) -> tuple[bool, bool, bool]:
        """Whether this member was asked to stop the run, to leave it, to regroup."""
        return self.stop_requested, self.leave_requested, self.regroup_requested

    def is_below_minimum(self, members: int) -> bool:
        return members < self.slot.min_members

    def leave_if_requested(self) -> None:
        """Leave at the end of a generation, if this member was asked to. Raises Gone then."""
        if self.leave_requested:
            self.announce_departure()

    def announce_departure(self) -> NoReturn:
        """Tell the others that this member is gone, and raise Gone."""
        self.store.put_if_absent(GONE.of(self.member), "left")
        raise MembershipEnded("left, as it was asked to", EXIT_REQUEUE)

    def form_next_generation(self, step: int) -> RankAssignment:
        """Form the next generation with whoever is there; returns when all of it say that they follow its plan.

        step: that this worker's state has reached; -1 where it has none.
        Raises Gone where the others went on without this one or the run has ended, RunError where the same error has
        come twice at the same step.
        """
        while True:
            number = self.generation + 1
            plan = self._agree_on_plan(number, step)
            self.generation = number
            self._stop_stale_server(plan)
            if plan.error:
                raise RunError(plan.error)
            if self.member not in plan.member_ids:
                if self.has_joined:
                    raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED)
                continue
            if self._confirm_plan(number, plan.member_ids):
                self.has_joined, self.regroup_requested = True, False
                return RankAssignment.from_plan(number, plan, self.member)

    def _agree_on_plan(self, number: int, step: int) -> GenerationPlan:
        """The plan of a generation, proposed by this member if it is the one to.

        A member that is asked to leave or to stop meanwhile leaves, if it has no state. One that has makes a generation
        with those who are there, however few: at the end of a step, they all save.
        """
        board, began, complete_since = self.store, time.monotonic(), None
        mine = Candidate(step, self.slot.host, self.slot.local_rank, self.has_joined)
        board.put_if_absent(CANDIDATE.of(number, self.member), mine)
        last = board.get(PLAN.of(number - 1))
        previous = last.member_ids if last is not None else []
        while True:
            if (plan := board.get(PLAN.of(number))) is not None:
                return plan
            if (verdict := board.get(VERDICT)) is not None:
                raise MembershipEnded("the run has ended", verdict.code)
            self.poll_supervisor()
            asked = self.leave_requested or self.stop_requested
            if asked and not self.has_joined:
                self.announce_departure()
            here, gone = board.get_all(CANDIDATE.of(number)), board.get_all(GONE)
            if self.member in gone:
                raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED)
            present = {member: about for member, about in here.items() if member not in gone}
            if previous:
                complete = all(member in here or member in gone for member in previous)
            else:
                # horovodrun's newest list lacks slots that could not be filled.
                expected = min((beat.assigned_size for beat in board.get_heartbeats().values()), default=self.slot.size)
                complete = len(here) >= expected or time.monotonic() - began > FIRST_PLAN_TIMEOUT
            if complete and (asked or len(present) >= self.slot.min_members):
                complete_since = complete_since or time.monotonic()
                line = [member for member in previous if member in present] + sorted(present.keys() - set(previous))
                if line[0] == self.member or time.monotonic() - complete_since > PROPOSER_TIMEOUT:
                    return self._propose_plan(number, line, present)
            # Others may train for long, or be too few, before there is a place for this one.
            time.sleep(PLAN_POLL_INTERVAL if time.monotonic() - began < FAST_POLL_SECONDS else 10 * PLAN_POLL_INTERVAL)

    def _propose_plan(self, number: int, line: Sequence[str], present: Mapping[str, Candidate]) -> GenerationPlan:
        """Propose a plan with these members, in this order, and return the plan that all follow."""
        members = assign_ranks(line, {member: candidate.host for member, candidate in present.items()})
        address = get_own_address(self.slot.interface, self.slot.address)
        server = RendezvousServer(address, format_assignments(members))
        steps = [present[member.id].step for member in members]
        step = max(steps)
        plan = GenerationPlan(members, (address, server.port), steps.index(step), step, self._find_give_up_reason())
        chosen = self.store.put_if_absent(PLAN.of(number), plan)
        if chosen != plan:
            server.stop_serving()
        else:
            if self.server is not None:
                self.server.stop_serving()
            self.server = server
        return chosen

    def _stop_stale_server(self, plan: GenerationPlan) -> None:
        """End the server of an earlier generation that this member gave, unless the plan is of it."""
        if self.server is not None and plan.server != (self.server.server_address[0], self.server.port):
            self.server.stop_serving()
            self.server = None

    def _confirm_plan(self, number: int, names: Sequence[str]) -> bool:
        """Whether all members of a plan say in time that they follow it: else some are gone, and there is another."""
        self.store.put_if_absent(FOLLOWS.of(number, self.member), True)
        deadline = time.monotonic() + FOLLOW_TIMEOUT
        while time.monotonic() < deadline:
            if len(self.store.get_all(FOLLOWS.of(number))) == len(names):
                return True
            if set(names) & set(self.store.get_all(GONE)):
                return False
            time.sleep(PLAN_POLL_INTERVAL)
        return False

    def report_error(self, step: int, error: Exception) -> None:
        """Publish and print an error of the recipe, so that the run ends when it comes again at the same step."""
        if isinstance(error, RecipeError):
            text, trace = str(error), error.trace
        else:
            text, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        print(f"{trace}hvdtrain: retrying once after an error after step {step}: {text}", file=sys.stderr)
        self.store.put_if_absent(ERROR.of(self.generation, self.member), TrainingError(step, text))

    def publish_start(self, step: int) -> None:
        """Publish, on rank 0, after how many steps this generation begins: what is behind it is safe."""
        self.store.put_if_absent(BEGAN.of(self.generation), step)

    def _find_give_up_reason(self) -> str | None:
        """Why there is to be no further generation, or None."""
        tries = count_tries(self.store.get_all(DEATH), self.store.get_all(ERROR), self.store.get_all(BEGAN))
        return self._find_repeated_error() or (f"no progress: {tries.text}" if tries.should_give_up else None)

    def _find_repeated_error(self) -> str | None:
        said: dict[tuple[int, str], set[str]] = {}
        for key, error in self.store.get_all(ERROR).items():
            said.setdefault((error.step, error.text), set()).add(key.partition("-")[0])
        twice = [(step, text) for (step, text), generations in said.items() if len(generations) > 1]
        return f"the same error came twice at step {twice[0][0]}: {twice[0][1]}" if twice else None

    def publish_end(self, code: int, error: str = "") -> None:
        """Say that the run has ended, with an exit code."""
        self.store.put_if_absent(VERDICT, Verdict(code, error))

    def has_run_ended(self) -> bool:
        """Whether the run has ended; also if nobody is left who could know."""
        try:
            return self.store.get(VERDICT) is not None
        except StoreUnreachable:
            return True

    def get_verdict(self) -> Verdict | None:
        """How the run has ended; None if it has not or nobody is left who could know."""
        try:
            return self.store.get(VERDICT)
        except StoreUnreachable:
            return None


def get_newest_plan(board: KeyValueStore) -> tuple[int, GenerationPlan | None]:
    """The newest generation's number and plan; 0 and None where there is none yet."""
    plans = board.get_all(PLAN)
    newest = max((int(number) for number in plans), default=0)
    return newest, plans.get(str(newest))


def get_own_address(interface: str, fallback: str) -> str:
    """This host's IPv4 address on an interface; `fallback` where it has none."""
    try:
        return interface_address(interface)
    except UserError:
        return fallback


def membership_from_environment() -> Membership | None:
    """This worker's membership, or None where the run is not elastic."""
    return Membership(os.environ) if MEMBER_VARIABLE in os.environ else None
