"""A worker's membership in an elastic run: how members become a generation, with ranks, and how it ends.

A generation is a fixed set of members that train together. It ends when a member is gone, or when all agree, at the
same step, to take newcomers in or to let some leave. Then each that is left writes on the board that it is here, with
the step that it has reached; when all of the last generation are here or gone, the first of them proposes a plan for
the next one. A plan is a fact: all follow the first.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.elastic.places import MEMBER_VARIABLE, MESSAGE_FD_VARIABLE, RankAssignment, Slot, assign_ranks
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
        given = json.loads(environ[MEMBER_VARIABLE])
        self.slot, self.member = Slot(**given["slot"]), str(given["member"])
        self.store = KeyValueStore(self.slot.address, self.slot.port)
        self.message_fd = int(environ[MESSAGE_FD_VARIABLE])
        os.set_blocking(self.message_fd, False)
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
        try:
            said = os.read(self.message_fd, 4096)
        except BlockingIOError:
            return
        self.leave_requested |= b"d" in said or not said  # nothing to read, ever again: the supervisor is dead
        self.regroup_requested |= b"r" in said
        self.stop_requested |= b"s" in said

    def get_requests(self) -> tuple[bool, bool, bool]:
        """Whether this member was asked to stop the run, to leave it, to regroup."""
        return self.stop_requested, self.leave_requested, self.regroup_requested

    def is_below_minimum(self, members: int) -> bool:
        return members < self.slot.least

    def leave_if_requested(self) -> None:
        """Leave at the end of a generation, if this member was asked to. Raises Gone then."""
        if self.leave_requested:
            self.announce_departure()

    def announce_departure(self) -> NoReturn:
        """Tell the others that this member is gone, and raise Gone."""
        self.store.put_if_absent(f"gone-{self.member}", "left")
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
            if plan.get("error"):
                raise RunError(plan["error"])
            names = [member["id"] for member in plan["members"]]
            if self.member not in names:
                if self.has_joined:
                    raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED)
                continue
            if self._confirm_plan(number, names):
                self.has_joined, self.regroup_requested = True, False
                mine = plan["members"][names.index(self.member)]
                keys = ("rank", "local_rank", "local_size", "cross_rank", "cross_size", "host")
                return RankAssignment(
                    generation=number,
                    size=len(names),
                    root=plan["root"],
                    step=plan["step"],
                    server=(plan["server"][0], plan["server"][1]),
                    **{key: mine[key] for key in keys},
                )

    def _agree_on_plan(self, number: int, step: int) -> dict[str, Any]:
        """The plan of a generation, proposed by this member if it is the one to.

        A member that is asked to leave or to stop meanwhile leaves, if it has no state. One that has makes a generation
        with those who are there, however few: at the end of a step, they all save.
        """
        board, began, complete_since = self.store, time.monotonic(), None
        about = {"step": step, "host": self.slot.host, "slot": self.slot.local_rank, "joined": self.has_joined}
        board.put_if_absent(f"here-{number}-{self.member}", about)
        previous = (board.get(f"plan-{number - 1}") or {"members": []})["members"]
        previous = [member["id"] for member in previous]
        while True:
            if (plan := board.get(f"plan-{number}")) is not None:
                return dict(plan)
            if (verdict := board.get("verdict")) is not None:
                raise MembershipEnded("the run has ended", int(verdict["code"]))
            self.poll_supervisor()
            asked = self.leave_requested or self.stop_requested
            if asked and not self.has_joined:
                self.announce_departure()
            here, gone = board.get_by_prefix(f"here-{number}-"), board.get_by_prefix("gone-")
            if self.member in gone:
                raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED)
            present = {member: about for member, about in here.items() if member not in gone}
            if previous:
                complete = all(member in here or member in gone for member in previous)
            else:
                # horovodrun's newest list lacks slots that could not be filled.
                expected = min((pulse["size"] for pulse in board.get_heartbeats().values()), default=self.slot.size)
                complete = len(here) >= expected or time.monotonic() - began > FIRST_PLAN_TIMEOUT
            if complete and (asked or len(present) >= self.slot.least):
                complete_since = complete_since or time.monotonic()
                line = [member for member in previous if member in present] + sorted(present.keys() - set(previous))
                if line[0] == self.member or time.monotonic() - complete_since > PROPOSER_TIMEOUT:
                    return self._propose_plan(number, line, present)
            # Others may train for long, or be too few, before there is a place for this one.
            time.sleep(PLAN_POLL_INTERVAL if time.monotonic() - began < FAST_POLL_SECONDS else 10 * PLAN_POLL_INTERVAL)

    def _propose_plan(self, number: int, line: Sequence[str], present: Mapping[str, Any]) -> dict[str, Any]:
        members = assign_ranks(line, present)
        assignments = {
            f"{m['host']}:{m['local_rank']}": ",".join(
                str(v)
                for v in (m["rank"], len(members), m["local_rank"], m["local_size"], m["cross_rank"], m["cross_size"])
            )
            for m in members
        }
        address = get_own_address(self.slot.interface, self.slot.address)
        server = RendezvousServer(address, assignments)
        steps = [present[member["id"]]["step"] for member in members]
        plan = {
            "members": members,
            "server": [address, server.port],
            "root": steps.index(max(steps)),
            "step": max(steps),
            "error": self._find_give_up_reason(),
        }
        chosen = self.store.put_if_absent(f"plan-{number}", plan)
        if chosen != plan:
            server.stop_serving()
        else:
            if self.server is not None:
                self.server.stop_serving()
            self.server = server
        return dict(chosen)

    def _stop_stale_server(self, plan: Mapping[str, Any]) -> None:
        """End the server of an earlier generation that this member gave, unless the plan is of it."""
        if self.server is not None and plan["server"] != [self.server.server_address[0], self.server.port]:
            self.server.stop_serving()
            self.server = None

    def _confirm_plan(self, number: int, names: Sequence[str]) -> bool:
        """Whether all members of a plan say in time that they follow it: else some are gone, and there is another."""
        self.store.put_if_absent(f"follows-{number}-{self.member}", True)
        deadline = time.monotonic() + FOLLOW_TIMEOUT
        while time.monotonic() < deadline:
            if len(self.store.get_by_prefix(f"follows-{number}-")) == len(names):
                return True
            if set(names) & set(self.store.get_by_prefix("gone-")):
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
        self.store.put_if_absent(f"error-{self.generation}-{self.member}", {"step": step, "text": text})

    def publish_start(self, step: int) -> None:
        """Publish, on rank 0, after how many steps this generation begins: what is behind it is safe."""
        self.store.put_if_absent(f"began-{self.generation}", step)

    def _find_give_up_reason(self) -> str | None:
        """Why there is to be no further generation, or None."""
        tries = count_tries(
            self.store.get_by_prefix("died-"), self.store.get_by_prefix("error-"), self.store.get_by_prefix("began-")
        )
        return self._find_repeated_error() or (f"no progress: {tries.text}" if tries.should_give_up else None)

    def _find_repeated_error(self) -> str | None:
        said: dict[tuple[int, str], set[str]] = {}
        for key, error in self.store.get_by_prefix("error-").items():
            said.setdefault((error["step"], error["text"]), set()).add(key.partition("-")[0])
        twice = [(step, text) for (step, text), generations in said.items() if len(generations) > 1]
        return f"the same error came twice at step {twice[0][0]}: {twice[0][1]}" if twice else None

    def publish_end(self, code: int, error: str = "") -> None:
        """Say that the run has ended, with an exit code."""
        self.store.put_if_absent("verdict", {"code": code, "error": error})

    def has_run_ended(self) -> bool:
        """Whether the run has ended; also if nobody is left who could know."""
        try:
            return self.store.get("verdict") is not None
        except StoreUnreachable:
            return True

    def get_verdict(self) -> dict[str, Any] | None:
        """How the run has ended, {code, error}; None if it has not or nobody is left who could know."""
        try:
            return self.store.get("verdict")  # type: ignore[no-any-return]
        except StoreUnreachable:
            return None


def get_newest_plan(board: KeyValueStore) -> tuple[int, dict[str, Any] | None]:
    """The newest generation's number and plan; 0 and None where there is none yet."""
    plans = board.get_by_prefix("plan-")
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
