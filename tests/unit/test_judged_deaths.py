"""What a supervisor does when its worker has died."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from hvdtrain.elastic.endings import RETRY_INTERVAL, FailureHandler
from hvdtrain.elastic.places import Slot
from hvdtrain.elastic.records import parse_fact
from hvdtrain.system.activity import ActivityRecord

SLOT = Slot("b", 1, 2, 2, "127.0.0.1", 1, "lo", 1)


class Facts:
    """A board in memory."""

    def __init__(self, **facts: Any) -> None:
        self.known = dict(facts)

    def get_by_prefix(self, prefix: str) -> dict[str, Any]:
        return {key[len(prefix) :]: value for key, value in self.known.items() if key.startswith(prefix)}

    def put_if_absent(self, key: str, value: Any) -> Any:
        return self.known.setdefault(key, value)


@pytest.fixture
def record() -> ActivityRecord:
    memory = os.memfd_create("test")
    record = ActivityRecord(memory)
    os.close(memory)
    record.write_activity(1, 4, 600.0, "computing gradients")
    return record


def endings(**facts: Any) -> FailureHandler:
    return FailureHandler(Facts(**facts), "b:1:x", SLOT)  # type: ignore[arg-type]


def other(member: str, failed: int, *, joined: bool = False) -> dict[str, Any]:
    return {"member": member, "failed": failed, "joined": joined}


PLAN = {"plan-1": {"members": [{"id": "mine"}, {"id": "theirs"}]}}


def test_the_first_death_costs_no_pause(record: ActivityRecord) -> None:
    judge = endings(**PLAN)
    after = judge.decide_after_death("mine", -9, record, 1, [])
    assert (after.failed_starts, after.restart_delay, after.exit_code) == (0, 0.0, None)
    assert judge.store.get_by_prefix("died-")["mine"]["steps"] == 4


def test_the_third_death_at_a_step_ends_the_run(record: ActivityRecord, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {f"plan-{number}": {"members": [{"id": f"mine{number}"}]} for number in (1, 2, 3)}
    judge = endings(**plans)
    assert [judge.decide_after_death(f"mine{n}", -11, record, 0, []).restart_delay for n in (1, 2)] == [0.0, 2.0]
    assert judge.decide_after_death("mine3", -11, record, 0, []).exit_code == 1
    assert judge.store.get_by_prefix("verdict")[""]["code"] == 1
    assert capsys.readouterr().err == (
        "hvdtrain: error: no progress: step 5 was not passed in 3 tries; in the last one, a worker on b was killed by "
        "signal 11 (SIGSEGV) while it was computing gradients\n"
    )


def test_a_worker_that_cannot_start_while_others_train_is_tried_now_and_then(record: ActivityRecord) -> None:
    others = [other("theirs", 0, joined=True)]
    pauses = [endings(**PLAN).decide_after_death("new", 9, record, starts, others) for starts in range(5)]
    assert [after.restart_delay for after in pauses] == [0.0, *[RETRY_INTERVAL] * 4]
    assert all(after.exit_code is None for after in pauses)


def test_nobody_starts_any_more(record: ActivityRecord) -> None:
    gone = {**PLAN, "gone-mine": "x", "gone-theirs": "x"}
    last = other("theirs", 0, joined=True)
    # The other slot has not failed to start as often yet: it has its chance.
    after = [endings(**gone).decide_after_death("new", 9, record, starts, [last]) for starts in range(5)]
    assert [found.restart_delay for found in after] == [2.0, 4.0, 8.0, 16.0, 32.0] and all(
        f.exit_code is None for f in after
    )
    assert endings(**gone).decide_after_death("new", 9, record, 2, [other("new2", 2)]).exit_code == 1


def test_no_worker_ever_starts(record: ActivityRecord) -> None:
    assert endings().decide_after_death("new", 9, record, 0, []).exit_code is None
    assert endings().decide_after_death("new", 9, record, 1, []).exit_code == 1
    assert endings().decide_after_death("new", 2, record, 0, []).exit_code == 2


def test_what_is_written_on_the_board_can_be_read_from_it(record: ActivityRecord) -> None:
    judge = endings(**PLAN)
    judge.decide_after_death("mine", -9, record, 1, [])
    judge.end_run(75, "")
    for key, value in judge.store.get_by_prefix("").items():
        if not key.startswith("plan-"):
            assert parse_fact(key, json.dumps(value)) == value
    assert parse_fact("began-3", "12") == 12
