"""Dataclasses as JSON between processes: what is accepted, and what is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from hvdtrain.system.records import encode_record, named, parse_record


@dataclass(frozen=True)
class Disk:
    free: int | None
    error: str | None = field(default=None, metadata=named("wrong"))


@dataclass(frozen=True)
class Host:
    name: str
    load: float = 0.0
    disks: dict[str, Disk] = field(default_factory=dict)
    address: tuple[str, int] | None = None
    newest: Disk | str | None = None


FULL = Host("a", 1.5, {"/x": Disk(7, "full")}, ("10.0.0.1", 80), Disk(None))


def test_a_record_is_read_back_from_its_json() -> None:
    text = json.dumps(encode_record(FULL))
    assert json.loads(text)["disks"] == {"/x": {"free": 7, "wrong": "full"}}
    assert parse_record(json.loads(text), Host) == FULL
    assert parse_record(encode_record([Host("b", newest="none")]), list[Host]) == [Host("b", newest="none")]


def test_unknown_entries_are_ignored_and_missing_ones_get_their_default() -> None:
    assert parse_record({"name": "a", "load": 2, "since": [3]}, Host) == Host("a", 2.0)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        {"name": 1},
        {"name": "a", "load": "1"},
        {"name": "a", "load": True},
        {"name": "a", "load": 2**70},
        {"name": "a", "load": None},
        {"name": "a", "disks": {"/x": {}}},
        {"name": "a", "disks": {"/x": {"free": 1.0}}},
        {"name": "a", "disks": []},
        {"name": "a", "address": ["10.0.0.1"]},
        {"name": "a", "address": ["10.0.0.1", 2**64]},
        {"name": "a", "newest": 3},
    ],
)
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        parse_record(value, Host)
