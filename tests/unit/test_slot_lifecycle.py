"""The states of a slot: what a supervisor does when its worker dies or leaves, and the run ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hvdtrain.elastic.endings import FailureHandler
from hvdtrain.elastic.lifecycle import SlotLifecycle, State
from hvdtrain.elastic.peers import PeerMonitor
from hvdtrain.elastic.records import GONE, VERDICT, Heartbeat, Verdict
from hvdtrain.elastic.slot import Request, Slot
from hvdtrain.system.errors import EXIT_REQUEUE, UserError
from hvdtrain.system.limits import SupervisorLimits
from tests.unit.test_judged_deaths import Facts, plan

SLOT = Slot("b", 1, 2, 2, "127.0.0.1", 1, "lo", 1)


class FakeWorker:
    """A worker that ends when a test gives it an exit code."""

    def __init__(self, member: str) -> None:
        self.member, self.code = member, None
        self.requests: list[Request] = []
        self.process = SimpleNamespace(poll=lambda: self.code, kill=self.kill)
        self.record = SimpleNamespace(read_activity=lambda: (1, 4, 600.0, "computing gradients"))
        self.was_killed = self.was_closed = False

    def kill(self) -> None:
        self.was_killed = True

    def close(self) -> None:
        self.was_closed = True

    def send(self, request: Request) -> None:
        self.requests.append(request)


class Fixture:
    """A lifecycle, and what surrounds it."""

    def __init__(self) -> None:
        self.store = Facts({"plan-1": plan("worker1", "theirs")})
        self.store.get_heartbeats = dict  # type: ignore[attr-defined]
        self.rounds = SimpleNamespace(find_unanswered=lambda: self.new_round, is_removed=False, is_suspended=False)
        self.new_round = 0
        self.workers: list[FakeWorker] = []
        store: Any = self.store
        rounds: Any = self.rounds
        handler = FailureHandler(store, "b:1:x", SLOT)
        monitor = PeerMonitor(store, "b:1:x", lease=10.0)
        self.slot = SlotLifecycle(self.start, store, handler, monitor, rounds, SupervisorLimits())

    def start(self) -> Any:
        self.workers.append(FakeWorker(f"worker{len(self.workers) + 1}"))
        return self.workers[-1]

    def end_worker(self, code: int) -> State:
        self.workers[-1].code = code  # type: ignore[assignment]
        return self.advance()

    def advance(self) -> State:
        while self.slot.advance():
            pass
        return self.slot.state

    def neighbour(self, *, drained: bool) -> None:
        beat = Heartbeat(1, "theirs", "b", 2, False, drained, True, 0)
        self.store.get_heartbeats = lambda: {"b:0:y": beat}  # type: ignore[attr-defined]


@pytest.fixture
def slot() -> Fixture:
    return Fixture()


def test_a_worker_that_dies_is_started_again_at_once(slot: Fixture) -> None:
    assert slot.advance() is State.RUNNING
    assert slot.end_worker(-9) is State.RUNNING
    assert [worker.member for worker in slot.workers] == ["worker1", "worker2"]
    assert slot.workers[0].was_closed
    assert slot.store.get(GONE.of("worker1")).startswith("was killed by signal 9")


def test_the_next_worker_is_started_after_a_pause(slot: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    slot.store.known["plan-2"] = plan("worker2")
    assert [slot.end_worker(-9), slot.end_worker(-9)] == [State.RUNNING, State.RESTARTING]
    later = slot.slot.restart_at
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert slot.advance() is State.RUNNING
    assert len(slot.workers) == 3


def test_no_worker_is_started_after_a_stop(slot: Fixture) -> None:
    slot.slot.requests.stop = True
    assert slot.end_worker(-9) is State.STOPPED
    assert slot.advance() is State.STOPPED
    slot.store.put_if_absent(VERDICT, Verdict(EXIT_REQUEUE, ""))
    assert slot.advance() is State.LEAVING and slot.slot.exit_code == EXIT_REQUEUE


@pytest.mark.parametrize(("request_name", "state"), [("stop", State.STOPPED), ("leave", State.ABSENT)])
def test_a_request_in_a_pause_cancels_the_restart(slot: Fixture, request_name: str, state: State) -> None:
    slot.store.known["plan-2"] = plan("worker2")
    slot.end_worker(-9)
    slot.end_worker(-9)
    setattr(slot.slot.requests, request_name, True)
    assert slot.advance() is state


@pytest.mark.parametrize(("asked", "code"), [(True, 0), (True, -9), (False, EXIT_REQUEUE)])
def test_a_slot_that_was_left_goes_in_the_next_round(slot: Fixture, asked: bool, code: int) -> None:
    slot.slot.requests.leave = asked
    assert slot.end_worker(code) is State.ABSENT
    assert slot.rounds.is_suspended and slot.slot.requests.leave
    assert slot.store.get(GONE.of("worker1")) == "left"
    slot.new_round = 7
    assert slot.advance() is State.LEAVING and slot.slot.exit_code == EXIT_REQUEUE


def test_a_slot_stays_as_long_as_its_host_has_another_worker(slot: Fixture) -> None:
    slot.neighbour(drained=False)
    slot.new_round = 7
    assert slot.end_worker(EXIT_REQUEUE) is State.DRAINED
    assert not slot.rounds.is_suspended
    slot.new_round = 0
    slot.neighbour(drained=True)
    slot.store.put_if_absent(GONE.of("theirs"), "left")
    assert slot.advance() is State.ABSENT
    slot.neighbour(drained=False)
    assert slot.advance() is State.DRAINED


@pytest.mark.parametrize("by", ["removal", "a second notice", "time"])
def test_a_slot_that_was_left_goes(slot: Fixture, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slot.end_worker(EXIT_REQUEUE) is State.ABSENT
    slot.rounds.is_removed, slot.slot.requests.second_notice = by == "removal", by == "a second notice"
    if by == "time":
        late = slot.slot.state_since + slot.slot.limits.worker_exit + 1
        monkeypatch.setattr("time.monotonic", lambda: late)
    assert slot.advance() is State.LEAVING and slot.slot.exit_code == EXIT_REQUEUE


@pytest.mark.parametrize("code", [0, -9, EXIT_REQUEUE])
def test_the_end_of_the_run_counts_for_more_than_how_the_worker_ended(slot: Fixture, code: int) -> None:
    slot.store.put_if_absent(VERDICT, Verdict(3, "an error"))
    assert slot.end_worker(code) is State.LEAVING and slot.slot.exit_code == 3


def test_a_worker_gets_time_to_end_with_the_run(slot: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    slot.slot.end_worker(["worker1"])
    assert slot.slot.state is State.ENDING and not slot.workers[0].was_killed
    late = slot.slot.state_since + slot.slot.limits.worker_exit + 1
    monkeypatch.setattr("time.monotonic", lambda: late)
    slot.slot.end_worker(["worker1"])
    assert slot.workers[0].was_killed


def test_a_worker_that_is_about_to_join_is_killed_at_the_end(slot: Fixture) -> None:
    slot.slot.end_worker(["theirs"])
    assert slot.workers[0].was_killed


def test_only_a_worker_that_lives_is_sent_requests(slot: Fixture) -> None:
    slot.slot.send_to_worker(Request.STOP)
    slot.end_worker(EXIT_REQUEUE)
    slot.slot.send_to_worker(Request.LEAVE)
    assert slot.workers[0].requests == [Request.STOP]


def test_the_lease_is_read_from_the_environment() -> None:
    assert SupervisorLimits.from_environment({"HVDTRAIN_LEASE": "4"}).lease == 4.0
    with pytest.raises(UserError, match="HVDTRAIN_LEASE is 'long'; expected seconds"):
        SupervisorLimits.from_environment({"HVDTRAIN_LEASE": "long"})
