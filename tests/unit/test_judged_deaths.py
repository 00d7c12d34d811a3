"""What a supervisor does when its worker has died."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest

from hvdtrain.elastic.endings import RETRY_INTERVAL, FailureHandler
from hvdtrain.elastic.ranks import assign_ranks
from hvdtrain.elastic.records import BEGAN, DEATH, PLAN, VERDICT, Fact, GenerationPlan, Heartbeat, dump_record
from hvdtrain.elastic.slot import Slot
from hvdtrain.system.activity import ActivityRecord
from hvdtrain.system.errors import EXIT_RESTART

SLOT = Slot("b", 1, 2, 2, "127.0.0.1", 1, "lo", 1)


class Facts:
    """A store in memory."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.known = dict(facts)

    def get_all(self, facts: Fact[Any]) -> dict[str, Any]:
        prefix = f"{facts.key}-"
        return {key.removeprefix(prefix): value for key, value in self.known.items() if key.startswith(prefix)}

    def get(self, fact: Fact[Any]) -> Any:
        return self.known.get(fact.key)

    require = get

    def put(self, fact: Fact[Any], value: Any) -> None:
        self.known.setdefault(fact.key, value)

    def put_if_absent(self, fact: Fact[Any], value: Any) -> Any:
        return self.known.setdefault(fact.key, value)


@pytest.fixture
def record() -> ActivityRecord:
    memory = os.memfd_create("test")
    record = ActivityRecord(memory)
    os.close(memory)
    record.write_activity(1, 4, 600.0, "computing gradients")
    return record


def handler(facts: Mapping[str, Any] | None = None) -> FailureHandler:
    return FailureHandler(Facts(facts or {}), "b:1:x", SLOT)  # type: ignore[arg-type]


def other(member: str, failed_starts: int, *, joined: bool = False) -> Heartbeat:
    return Heartbeat(1, member, "c", 2, False, False, joined, failed_starts)


def plan(*members: str) -> GenerationPlan:
    planned = assign_ranks(members, dict.fromkeys(members, "b"))
    return GenerationPlan(planned, [("127.0.0.1", 4711)], 0, -1, None)


PLAN_1 = {"plan-1": plan("mine", "theirs")}


def test_the_first_death_costs_no_pause(record: ActivityRecord) -> None:
    judge = handler(PLAN_1)
    after = judge.decide_after_death("mine", -9, record, 1, [])
    assert (after.failed_starts, after.restart_delay, after.exit_code) == (0, 0.0, None)
    assert judge.store.get_all(DEATH)["mine"].steps == 4


def test_a_worker_that_another_of_its_replica_has_failed_costs_nothing(record: ActivityRecord) -> None:
    judge = handler(PLAN_1)
    joined = [judge.decide_after_death("mine", EXIT_RESTART, record, 1, []) for _ in range(5)]
    assert {(after.failed_starts, after.restart_delay, after.exit_code) for after in joined} == {(0, 0.0, None)}
    assert not judge.store.get_all(DEATH)
    before = judge.decide_after_death("new", EXIT_RESTART, record, 4, [])
    assert (before.failed_starts, before.restart_delay, before.exit_code) == (5, 0.0, None)


def test_the_third_death_at_a_step_ends_the_run(record: ActivityRecord, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {f"plan-{number}": plan(f"mine{number}") for number in (1, 2, 3)}
    judge = handler(plans)
    assert [judge.decide_after_death(f"mine{n}", -11, record, 0, []).restart_delay for n in (1, 2)] == [0.0, 2.0]
    assert judge.decide_after_death("mine3", -11, record, 0, []).exit_code == 1
    assert judge.store.require(VERDICT).code == 1
    assert capsys.readouterr().err == (
        "hvdtrain: error: no progress: step 5 was not passed in 3 tries; in the last one, a worker on b was killed by "
        "signal 11 (SIGSEGV) while it was computing gradients\n"
    )


def test_a_worker_that_cannot_start_while_others_train_is_tried_now_and_then(record: ActivityRecord) -> None:
    others = [other("theirs", 0, joined=True)]
    pauses = [handler(PLAN_1).decide_after_death("new", 9, record, starts, others) for starts in range(5)]
    assert [after.restart_delay for after in pauses] == [0.0, *[RETRY_INTERVAL] * 4]
    assert all(after.exit_code is None for after in pauses)


def test_nobody_starts_any_more(record: ActivityRecord) -> None:
    gone = {**PLAN_1, "gone-mine": "x", "gone-theirs": "x"}
    last = other("theirs", 0, joined=True)
    # The other slot has not failed to start as often yet: it has its chance.
    after = [handler(gone).decide_after_death("new", 9, record, starts, [last]) for starts in range(5)]
    assert [found.restart_delay for found in after] == [2.0, 4.0, 8.0, 16.0, 32.0] and all(
        f.exit_code is None for f in after
    )
    assert handler(gone).decide_after_death("new", 9, record, 2, [other("new2", 2)]).exit_code == 1


def test_no_worker_ever_starts(record: ActivityRecord) -> None:
    assert handler().decide_after_death("new", 9, record, 0, []).exit_code is None
    assert handler().decide_after_death("new", 9, record, 1, []).exit_code == 1
    assert handler().decide_after_death("new", 2, record, 0, []).exit_code == 2


def test_what_is_written_on_the_board_can_be_read_from_it(record: ActivityRecord) -> None:
    judge = handler(PLAN_1)
    judge.decide_after_death("mine", -9, record, 1, [])
    judge.end_run(75, "")
    for fact in (PLAN.of(1), DEATH.of("mine"), VERDICT):
        value = judge.store.get(fact)
        assert value is not None and fact.parse(fact.key, dump_record(value)) == value
    assert BEGAN.parse("began-3", "12") == 12
