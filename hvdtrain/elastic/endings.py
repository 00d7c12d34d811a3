"""What a supervisor does when its worker has died: start another one, end the run for all, or let its own slot fail.

another one of its replica was lost (EXIT_RESTART) another one, at once
the worker had joined a generation                 another one, at once or after a pause; or the run ends, when it
                                                   makes no progress (hvdtrain.elastic.tries)
it had not, and no worker has ever joined one      another one, once; then the slot fails
                others train                       another one; after two failed starts once a minute
                all others fail to start, too      another one, up to three times; then the run ends
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hvdtrain.elastic.records import BEGAN, DEATH, ERROR, GONE, PLAN, VERDICT, Heartbeat, Verdict, WorkerDeath
from hvdtrain.elastic.slot import Slot
from hvdtrain.elastic.store import KeyValueStore
from hvdtrain.elastic.tries import MAX_TRIES_PER_STEP, count_tries, describe_exit_code
from hvdtrain.system import messages
from hvdtrain.system.activity import ActivityRecord
from hvdtrain.system.errors import EXIT_FAILED, EXIT_RESTART, EXIT_USER_ERROR

MAX_FAILED_STARTS = 2  # of a slot's workers in a row, after which one is started only once in RETRY_INTERVAL
RETRY_INTERVAL = 60.0  # seconds


@dataclass(frozen=True)
class DeathResponse:
    """What a supervisor does when its worker has died."""

    failed_starts: int  # in a row, of its workers
    restart_delay: float = 0.0  # seconds before the next worker is started
    exit_code: int | None = None  # to leave with instead


@dataclass(frozen=True)
class FailureHandler:
    """Decides for one slot's supervisor, called `name` in the store."""

    store: KeyValueStore
    name: str
    slot: Slot

    def decide_after_death(
        self, member: str, code: int, record: ActivityRecord, failed_starts: int, others: Sequence[Heartbeat]
    ) -> DeathResponse:
        """Decide what follows the death of this slot's worker, and end the run if it makes no progress.

        Args:
            member: the worker.
            code: its return code, as subprocess gives it.
            record: its last activity.
            failed_starts: how many of this slot's workers before it, in a row, died without joining a generation.
            others: the heartbeats of the other supervisors that are alive.
        """
        plans, (_, steps, _, what) = self.store.get_all(PLAN), record.read_activity()
        generations = [int(number) for number, plan in plans.items() if member in plan.member_ids]
        if code == EXIT_RESTART:  # another worker's death, which counts
            return DeathResponse(0 if generations else failed_starts + 1)
        text = f"a worker on {self.slot.host} {describe_exit_code(code)} while it was {what}"
        if generations:
            death = WorkerDeath(max(generations), steps, describe_exit_code(code), what, self.slot.host)
            deaths = {**self.store.get_all(DEATH), member: self.store.put_if_absent(DEATH.of(member), death)}
            tries = count_tries(deaths, self.store.get_all(ERROR), self.store.get_all(BEGAN))
            ending = self.end_run(EXIT_FAILED, f"no progress: {tries.text}") if tries.should_give_up else None
            return DeathResponse(0, tries.next_try_delay(), ending)
        failed_starts += 1
        if not plans and (code == EXIT_USER_ERROR or failed_starts >= MAX_FAILED_STARTS):
            ending = EXIT_USER_ERROR if code == EXIT_USER_ERROR else EXIT_FAILED
            self.report_failure(ending, f"no worker starts: {text}", ends=False)
            return DeathResponse(failed_starts, exit_code=ending)
        gone = self.store.get_all(GONE)
        if not plans or any(other.joined and other.member not in gone for other in others):  # who train
            return DeathResponse(failed_starts, RETRY_INTERVAL if failed_starts >= MAX_FAILED_STARTS else 0.0)
        if failed_starts < MAX_TRIES_PER_STEP or any(other.failed_starts < MAX_TRIES_PER_STEP - 1 for other in others):
            return DeathResponse(failed_starts, min(2.0**failed_starts, RETRY_INTERVAL))
        return DeathResponse(failed_starts, exit_code=self.end_run(EXIT_FAILED, f"no worker starts any more: {text}"))

    def end_run(self, code: int, error: str) -> int:
        """End the run for all and report why, unless it has ended already; return the run's exit code.

        Args:
            code: the exit code.
            error: "" for a stop.
        """
        mine = Verdict(code, error, self.name)
        verdict = self.store.put_if_absent(VERDICT, mine)
        if verdict == mine and error:
            self.report_failure(code, error, ends=True)
        elif verdict == mine:
            messages.send_message(messages.RankFinished(self.slot.local_rank, code))
        return verdict.code

    def report_failure(self, code: int, error: str, *, ends: bool) -> None:
        """Report to the launcher why this slot fails. ends: the run ends with it, whichever other slots there are."""
        slot = self.slot
        messages.send_message(messages.RankFailed(slot.local_rank, slot.host, os.getpid(), code, error, ends=ends))
        if not messages.is_launched():
            print(f"hvdtrain: error: {error}", file=sys.stderr, flush=True)
