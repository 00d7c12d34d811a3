"""How workers that build their parts of a model together meet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from hvdtrain.elastic.generation import GenerationFormer, MemberRequests, MembershipEnded
from hvdtrain.elastic.records import FOLLOWS, GONE, REPLICA, VERDICT, ReplicaPlan, Verdict
from hvdtrain.elastic.replica import ReplicaMeeting
from hvdtrain.system.errors import EXIT_REQUEUE, EXIT_RESTART
from hvdtrain.system.limits import GenerationLimits
from hvdtrain.system.signed_http import SECRET
from tests.unit.test_judged_deaths import SLOT, Facts


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Facts]:
    monkeypatch.setenv(SECRET, "k" * 64)
    yield Facts({})


class Worker(threading.Thread):
    """A worker that meets its replica of two, in a thread."""

    def __init__(self, facts: Facts, member: str, place: int, limits: GenerationLimits | None = None) -> None:
        super().__init__()
        store: Any = facts
        self.former = GenerationFormer(store, replace(SLOT, local_rank=place), member, limits or GenerationLimits())
        self.former.replica_ranks = 2
        self.requests = MemberRequests()
        self.plan: ReplicaPlan | None = None
        self.ending: MembershipEnded | None = None
        self.start()

    def run(self) -> None:
        meeting = ReplicaMeeting(self.former)
        try:
            self.plan = meeting.meet(lambda: self.requests)
        except MembershipEnded as ending:
            self.ending = ending
        meeting.close()

    def find_end(self) -> int | None:
        """Wait; return the exit code with which it ends, None if it has met the others."""
        self.join()
        return self.ending.exit_code if self.ending is not None else None


def test_workers_of_a_host_meet_by_their_slots(facts: Facts) -> None:
    workers = [Worker(facts, f"m{place}", place) for place in (3, 0, 1, 2)]
    assert [worker.find_end() for worker in workers] == [None] * 4
    assert [worker.former.replica for worker in workers] == [["m2", "m3"], ["m0", "m1"], ["m0", "m1"], ["m2", "m3"]]
    assert workers[0].plan == workers[3].plan


def test_a_successor_meets_nobody_who_has_met_before(facts: Facts) -> None:
    first = [Worker(facts, f"m{place}", place) for place in (0, 1)]
    assert [worker.find_end() for worker in first] == [None, None]
    facts.put(GONE.of("m1"), "died")
    successor = Worker(facts, "n1", 1)
    with pytest.raises(MembershipEnded) as ended:
        first[0].former.check_not_gone(facts.get_all(GONE))
    assert ended.value.exit_code == EXIT_RESTART
    neighbour = Worker(facts, "n0", 0)
    assert successor.find_end() is neighbour.find_end() is None
    assert successor.former.replica == ["n0", "n1"]


def test_one_that_does_not_come_to_the_meeting_is_not_waited_for(facts: Facts) -> None:
    facts.put(REPLICA.of("m0"), ReplicaPlan(["m0", "m1"], ("127.0.0.1", 1)))
    late = Worker(facts, "m0", 0, GenerationLimits(follow=0.1))
    assert late.find_end() == EXIT_RESTART
    facts.put(GONE.of("m1"), "died")
    assert Worker(facts, "m0", 0).find_end() == EXIT_RESTART
    assert list(facts.get_all(FOLLOWS.of(0))) == ["m0"]


def test_one_that_waits_leaves_if_it_is_asked_to_or_the_run_ends(facts: Facts) -> None:
    worker = Worker(facts, "m1", 1)
    worker.requests = MemberRequests(leave=True)
    assert worker.find_end() == EXIT_REQUEUE
    assert facts.get(GONE.of("m1")) == "left"
    other = Worker(facts, "m3", 3)
    facts.put(VERDICT, Verdict(0, ""))
    assert other.find_end() == 0
