"""How a supervisor ends the run for all, or reports that its own slot fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvdtrain.elastic.places import Slot
from hvdtrain.elastic.store import Board
from hvdtrain.elastic.tries import STEP_TRIES, Death, count_tries, describe_end
from hvdtrain.system import messages
from hvdtrain.system.activity import Record
from hvdtrain.system.errors import EXIT_FAILED, EXIT_USER

STARTS = 2  # failed starts of a worker in a row, after which it is tried again only now and then
NOW_AND_THEN = 60.0  # seconds


@dataclass(frozen=True)
class AfterDeath:
    """What a supervisor does when its worker has died."""

    failed_starts: int  # in a row, of its workers
    pause: float = 0.0  # seconds before the next worker is started
    code: int | None = None  # to leave with instead


@dataclass(frozen=True)
class Endings:
    """What one slot's supervisor, called `name` on the board, may say of the end."""

    board: Board
    name: str
    slot: Slot

    def judge_death(
        self, member: str, code: int, record: Record, failed_starts: int, others: Sequence[Mapping[str, Any]]
    ) -> AfterDeath:
        """Decide what follows the death of this slot's worker, and end the run if it makes no progress.

        Args:
            member: the worker. code: its return code, as subprocess gives it. record: what it was in.
            failed_starts: how many of this slot's workers before it died without joining a generation.
            others: the pulses of the other supervisors that are alive.
        """
        plans, (_, steps, _, what) = self.board.facts("plan-"), record.read()
        generations = [int(number) for number, plan in plans.items() if member in [m["id"] for m in plan["members"]]]
        text = f"a worker on {self.slot.host} {describe_end(code)} while it was {what}"
        if generations:
            death = asdict(Death(max(generations), steps, describe_end(code), what, self.slot.host))
            deaths = {**self.board.facts("died-"), member: self.board.propose(f"died-{member}", death)}
            tries = count_tries(deaths, self.board.facts("error-"), self.board.facts("began-"))
            ending = self.end_run(EXIT_FAILED, f"no progress: {tries.text}") if tries.given_up else None
            return AfterDeath(0, tries.pause(), ending)
        failed_starts += 1
        if not plans and (code == EXIT_USER or failed_starts >= STARTS):
            ending = EXIT_USER if code == EXIT_USER else EXIT_FAILED
            self.report_failure(ending, f"no worker starts: {text}", ends=False)
            return AfterDeath(failed_starts, code=ending)
        gone = self.board.facts("gone-")
        if not plans or any(other["joined"] and other["member"] not in gone for other in others):  # who train
            return AfterDeath(failed_starts, NOW_AND_THEN if failed_starts >= STARTS else 0.0)
        if failed_starts < STEP_TRIES or any(other["failed"] < STEP_TRIES - 1 for other in others):
            return AfterDeath(failed_starts, min(2.0**failed_starts, NOW_AND_THEN))
        return AfterDeath(failed_starts, code=self.end_run(EXIT_FAILED, f"no worker starts any more: {text}"))

    def end_run(self, code: int, error: str) -> int:
        """End the run for all with an exit code, and report why, unless it has ended already; the run's exit code.

        error: "" for a stop.
        """
        mine = {"code": code, "error": error, "by": self.name}
        verdict = self.board.propose("verdict", mine)
        if verdict == mine and error:
            self.report_failure(code, error, ends=True)
        elif verdict == mine:
            messages.send("finished", rank=self.slot.local_rank, code=code)
        return int(verdict["code"])

    def report_failure(self, code: int, error: str, *, ends: bool) -> None:
        """Report to the launcher why this slot fails. ends: and the run with it, whoever else is there."""
        about = {"rank": self.slot.local_rank, "host": self.slot.host, "pid": os.getpid()}
        messages.send("failed", **about, code=code, error=error, traceback="", ends=ends)
        if not messages.launched():
            print(f"hvdtrain: error: {error}", file=sys.stderr, flush=True)
