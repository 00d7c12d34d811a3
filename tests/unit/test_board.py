"""What is read from the board of an elastic run: valid values, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.elastic import store as boards
from hvdtrain.elastic.places import assign_ranks
from hvdtrain.elastic.records import parse_fact, parse_heartbeat
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable
from hvdtrain.system.signed_http import SECRET

KEY = "k" * 64
MEMBERS = assign_ranks(["a:0:x.1", "b:0:y.1"], {"a:0:x.1": {"host": "a"}, "b:0:y.1": {"host": "b-1.net"}})
PLAN = {"members": MEMBERS, "server": ["127.0.0.1", 4711], "root": 1, "step": -1, "error": None}
PULSE = {
    "beats": 1,
    "member": "m",
    "host": "h",
    "size": 2,
    "ending": False,
    "drained": False,
    "joined": True,
    "failed": 0,
}
GOOD: list[tuple[str, Any]] = [
    ("verdict", {"code": 0, "error": ""}),
    ("plan-1", PLAN),
    ("plan-12", {**PLAN, "error": "the same error came twice", "more": 1}),
    ("here-1-a:0:x.1", {"step": -1, "host": "a", "slot": 0, "joined": False}),
    ("follows-1-a:0:x.1", True),
    ("error-3-a:0:x.1", {"step": 3, "text": "ValueError"}),
    ("gone-a:0:x.1", "lost"),
    ("folder", "/runs/1"),
    ("examples", [1, 2]),
]


@pytest.mark.parametrize(("key", "value"), GOOD, ids=[key for key, _ in GOOD])
def test_what_members_write_is_read(key: str, value: Any) -> None:
    assert parse_fact(key, json.dumps(value)) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("verdict", {"code": "1", "error": ""}),
        ("verdict", {"code": True, "error": ""}),
        ("verdict", {"code": 256, "error": ""}),
        ("verdict", {"code": -1, "error": ""}),
        ("verdict", {"code": 1}),
        ("verdict", []),
        ("verdict", None),
        ("plan-x", PLAN),
        ("plan-1", {**PLAN, "members": []}),
        ("plan-1", {**PLAN, "members": [*MEMBERS, 3]}),
        ("plan-1", {**PLAN, "members": [MEMBERS[1], MEMBERS[0]]}),
        ("plan-1", {**PLAN, "members": [{**MEMBERS[0], "host": "-oProxyCommand=x"}], "root": 0}),
        ("plan-1", {**PLAN, "root": 2}),
        ("plan-1", {**PLAN, "server": ["127.0.0.1"]}),
        ("plan-1", {**PLAN, "server": ["127.0.0.1", 0]}),
        ("plan-1", {**PLAN, "server": ["a b", 80]}),
        ("plan-1", {**PLAN, "step": 1.5}),
        ("here-1-a", {"step": 1, "host": "-x", "slot": 0, "joined": False}),
        ("here-1-a", {"step": 2**70, "host": "x", "slot": 0, "joined": False}),
        ("here--a", {"step": 1, "host": "x", "slot": 0, "joined": False}),
        ("follows-1-a", 1),
        ("gone-a", {"why": "lost"}),
        ("error-1-a", {"step": 1}),
    ],
)
def test_what_is_not_valid_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError):
        parse_fact(key, json.dumps(value))
    for text in ("{", "", "\xff", "[" * 100_000):
        with pytest.raises(ValueError):
            parse_fact(key, text)


def test_a_sign_of_life_that_is_not_valid_is_refused() -> None:
    assert parse_heartbeat(json.dumps(PULSE)) == PULSE
    for name in PULSE:
        with pytest.raises(ValueError):
            parse_heartbeat(json.dumps({**PULSE, name: []}))
        with pytest.raises(ValueError):
            parse_heartbeat(json.dumps({other: value for other, value in PULSE.items() if other != name}))


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
    store.values[f"/{boards.FACT_SCOPE}/verdict"] = b'{"code": "0"}'
    store.values[f"/{boards.ROUND_SCOPE}/newest"] = b"many"
    mixed = {"plan-1": json.dumps(PLAN), "plan-2": "{}", "plan-x": json.dumps(PLAN)}
    store.values[f"/{boards.FACT_SCOPE}/plan-*"] = json.dumps(mixed).encode()
    store.values[f"/{boards.HEARTBEAT_SCOPE}/*"] = json.dumps({"a": json.dumps(PULSE), "b": "[]"}).encode()
    for _ in range(2):
        assert board.get("verdict") is None
        assert board.get_newest_round() == 0
        assert board.get_by_prefix("plan-") == {"1": PLAN}
        assert board.get_heartbeats() == {"a": PULSE}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and all(line.startswith("hvdtrain: dropped an invalid value of ") for line in said)


def test_a_server_that_does_not_know_the_secret_is_lost(
    store: RendezvousServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, "o" * 64)
    with pytest.raises(
        StoreUnreachable, match=r"answers 401 to GET /hvdtrain.facts/verdict without this run's signature"
    ):
        KeyValueStore("127.0.0.1", store.port).get("verdict")
