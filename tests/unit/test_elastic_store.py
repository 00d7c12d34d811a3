"""What is read from the key-value store of an elastic run: valid values, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.elastic import store as stores
from hvdtrain.elastic.ranks import assign_ranks
from hvdtrain.elastic.records import (
    AGREEMENT,
    BEGAN,
    CANDIDATE,
    DEATH,
    ERROR,
    FOLDER,
    FOLLOWS,
    GONE,
    PLAN,
    REPLICA,
    VERDICT,
    Candidate,
    Fact,
    GenerationPlan,
    Heartbeat,
    ReplicaPlan,
    TrainingError,
    Verdict,
    WorkerDeath,
    dump_record,
)
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable
from hvdtrain.system.signed_http import SECRET

KEY = "k" * 64
MEMBERS = assign_ranks(["a:0:x.1", "b:0:y.1"], {"a:0:x.1": "a", "b:0:y.1": "b-1.net"})
GENERATION = GenerationPlan(MEMBERS, [("127.0.0.1", 4711)], root=1, step=-1, error=None)
HEARTBEAT = Heartbeat(
    beats=1, member="m", host="h", assigned_size=2, ending=False, drained=False, joined=True, failed_starts=0
)
CANDIDATE_1 = CANDIDATE.of(1, "a:0:x.1")
GOOD: list[tuple[Fact[Any], Any]] = [
    (VERDICT, Verdict(0, "")),
    (VERDICT, Verdict(1, "no progress", "a:0:x")),
    (PLAN.of(1), GENERATION),
    (PLAN.of(12), replace(GENERATION, error="the same error came twice")),
    (CANDIDATE_1, Candidate(step=-1, host="a", slot=0, joined=False)),
    (REPLICA.of("a:0:x.1"), ReplicaPlan(["a:0:x.1", "a:1:y.1"], ("127.0.0.1", 4711))),
    (FOLLOWS.of(1, "a:0:x.1"), True),
    (ERROR.of(3, "a:0:x.1"), TrainingError(3, "ValueError")),
    (GONE.of("a:0:x.1"), "lost"),
    (DEATH.of("a:0:x.1"), WorkerDeath(1, 4, "ended with code 9", "training", "a")),
    (BEGAN.of(2), 17),
    (FOLDER, "/runs/1"),
    (AGREEMENT, {"options": [1, 2]}),
]


@pytest.mark.parametrize(("fact", "value"), GOOD, ids=[fact.key for fact, _ in GOOD])
def test_what_members_write_is_read(fact: Fact[Any], value: Any) -> None:
    assert fact.parse(fact.key, dump_record(value)) == value


def test_fields_of_a_later_version_are_left_out() -> None:
    assert PLAN.parse("plan-1", json.dumps({**asdict(GENERATION), "more": 1})) == GENERATION


PLAN_1, MEMBERS_1 = asdict(GENERATION), asdict(GENERATION)["members"]


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        (VERDICT, {"code": "1", "error": ""}),
        (VERDICT, {"code": True, "error": ""}),
        (VERDICT, {"code": 256, "error": ""}),
        (VERDICT, {"code": -1, "error": ""}),
        (VERDICT, {"code": 1}),
        (VERDICT, []),
        (VERDICT, None),
        (PLAN.of("x"), PLAN_1),
        (PLAN.of(1), {**PLAN_1, "members": []}),
        (PLAN.of(1), {**PLAN_1, "members": [*MEMBERS_1, 3]}),
        (PLAN.of(1), {**PLAN_1, "members": [MEMBERS_1[1], MEMBERS_1[0]]}),
        (PLAN.of(1), {**PLAN_1, "members": [{**MEMBERS_1[0], "host": "-oProxyCommand=x"}], "root": 0}),
        (PLAN.of(1), {**PLAN_1, "root": 2}),
        (PLAN.of(1), {**PLAN_1, "servers": [["127.0.0.1"]]}),
        (PLAN.of(1), {**PLAN_1, "servers": [["127.0.0.1", 0]]}),
        (PLAN.of(1), {**PLAN_1, "servers": [["a b", 80]]}),
        (PLAN.of(1), {**PLAN_1, "servers": []}),
        (PLAN.of(1), {**PLAN_1, "servers": 3 * PLAN_1["servers"]}),
        (PLAN.of(1), {**PLAN_1, "step": 1.5}),
        (PLAN.of(1), {**PLAN_1, "error": 1}),
        (CANDIDATE_1, {"step": 1, "host": "-x", "slot": 0, "joined": False}),
        (CANDIDATE_1, {"step": 2**70, "host": "x", "slot": 0, "joined": False}),
        (CANDIDATE.of("", "a"), {"step": 1, "host": "x", "slot": 0, "joined": False}),
        (FOLLOWS.of(1, "a"), 1),
        (GONE.of("a"), {"why": "lost"}),
        (ERROR.of(1, "a"), {"step": 1}),
    ],
)
def test_what_is_not_valid_is_refused(fact: Fact[Any], value: Any) -> None:
    with pytest.raises(ValueError):
        fact.parse(fact.key, json.dumps(value))
    for text in ("{", "", "\xff", "[" * 100_000):
        with pytest.raises(ValueError):
            fact.parse(fact.key, text)


@pytest.mark.parametrize("name", [field.name for field in fields(Heartbeat)])
def test_a_heartbeat_that_is_not_valid_counts_as_not_sent(store: RendezvousServer, name: str) -> None:
    good = asdict(HEARTBEAT)
    wrong = {"a": good | {name: []}, "b": {key: value for key, value in good.items() if key != name}, "c": good}
    texts = {key: json.dumps(value) for key, value in wrong.items()}
    store.values[f"/{stores.HEARTBEAT_SCOPE}/*"] = json.dumps(texts).encode()
    assert KeyValueStore("127.0.0.1", store.port).get_heartbeats() == {"c": HEARTBEAT}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[RendezvousServer]:
    monkeypatch.setenv(SECRET, KEY)
    server = RendezvousServer("127.0.0.1", {})
    monkeypatch.setattr("hvdtrain.comm.rendezvous.GET_WAIT_SECONDS", 0)
    yield server
    server.stop_serving()


def test_a_value_that_is_not_valid_counts_as_not_written_and_is_reported_once(
    store: RendezvousServer, capsys: pytest.CaptureFixture[str]
) -> None:
    board = KeyValueStore("127.0.0.1", store.port)
    store.values[f"/{stores.FACT_SCOPE}/verdict"] = b'{"code": "0"}'
    store.values[f"/{stores.ROUND_SCOPE}/newest"] = b"many"
    mixed = {"plan-1": json.dumps(PLAN_1), "plan-2": "{}", "plan-x": json.dumps(PLAN_1)}
    store.values[f"/{stores.FACT_SCOPE}/plan-*"] = json.dumps(mixed).encode()
    store.values[f"/{stores.HEARTBEAT_SCOPE}/*"] = json.dumps({"a": json.dumps(asdict(HEARTBEAT)), "b": "[]"}).encode()
    for _ in range(2):
        assert board.get(VERDICT) is None
        assert board.get_newest_round() == 0
        assert board.get_all(PLAN) == {"1": GENERATION}
        assert board.get_heartbeats() == {"a": HEARTBEAT}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and all(line.startswith("hvdtrain: dropped an invalid value of ") for line in said)


def test_a_server_that_does_not_know_the_secret_is_lost(
    store: RendezvousServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, "o" * 64)
    with pytest.raises(
        StoreUnreachable, match=r"answers 401 to GET /hvdtrain.facts/verdict without this run's signature"
    ):
        KeyValueStore("127.0.0.1", store.port).get(VERDICT)
