"""What the members of an elastic run write for each other, and whether a value is what its key says.

Values come from another process, of another version perhaps, or from one that has gone wrong: what is not exactly what
is expected is not read at all (hvdtrain/elastic/store.py).
"""

from __future__ import annotations

import json
import re
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

MEMBER_HOST_PATTERN = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
RECORD_INTEGER_BOUND = 2**62


class Verdict(TypedDict):
    """How the run has ended."""

    code: int
    error: str


class PlannedMember(TypedDict):
    """A member of a generation, and its place in it."""

    id: str
    host: str
    rank: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


class GenerationPlan(TypedDict):
    """A generation."""

    members: list[PlannedMember]
    server: list[Any]  # address and port
    root: int
    step: int
    error: str | None


class Presence(TypedDict):
    """A worker that is ready for a generation."""

    step: int
    host: str
    slot: int
    joined: bool


class WorkerError(TypedDict):
    """An error of the recipe."""

    step: int
    text: str


class Heartbeat(TypedDict):
    """A supervisor's sign of life."""

    beats: int
    member: str
    host: str
    size: int
    ending: bool
    drained: bool
    joined: bool  # its worker, a generation
    failed: int  # starts of its workers in a row


class DeathRecord(TypedDict):
    """How a worker that had joined a generation ended: hvdtrain.elastic.tries.WorkerDeath."""

    generation: int
    steps: int
    cause: str
    what: str
    host: str


# By the form of the key.
FACT_TYPES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"verdict"), Verdict),
    (re.compile(r"plan-[0-9]{1,9}"), GenerationPlan),
    (re.compile(r"here-[0-9]{1,9}-.+"), Presence),
    (re.compile(r"follows-[0-9]{1,9}-.+"), bool),
    (re.compile(r"error-[0-9]{1,9}-.+"), WorkerError),
    (re.compile(r"gone-.+"), str),
    (re.compile(r"died-.+"), DeathRecord),
    (re.compile(r"began-[0-9]{1,9}"), int),
    (re.compile(r"folder"), str),
]
FACT_KINDS = ("verdict", "plan", "here", "follows", "error", "gone", "died", "began", "folder")


def parse_fact(key: str, text: bytes | str) -> Any:
    """The value of a fact. Raises ValueError if it is not one that its key can have."""
    value = load_json(text)
    for form, kind in FACT_TYPES:
        if form.fullmatch(key):
            return check_record(value, kind)
    if key.partition("-")[0] in FACT_KINDS:
        raise ValueError("a key of an unknown form")
    return value


def parse_heartbeat(text: bytes | str) -> Any:
    """A supervisor's sign of life. Raises ValueError."""
    return check_record(load_json(text), Heartbeat)


def load_json(text: bytes | str) -> Any:
    """The value of JSON text. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_record(value: Any, kind: Any) -> Any:
    """The value, if it has the fields of its kind with values of their types. Raises ValueError."""
    if not matches_type(value, kind):
        raise ValueError(f"{value!r:.100} is no {getattr(kind, '__name__', kind)}")
    if kind is Verdict and not 0 <= value["code"] < 256:
        raise ValueError(f"code {value['code']}")
    if kind is GenerationPlan:
        check_generation_plan(value)
    if isinstance(value, dict) and "host" in value and not MEMBER_HOST_PATTERN.fullmatch(value["host"]):
        raise ValueError(f"host {value['host']!r:.100}")
    return value


def check_generation_plan(plan: GenerationPlan) -> None:
    """Raise ValueError for places that do not fit together."""
    members, server = plan["members"], plan["server"]
    if [member["rank"] for member in members] != list(range(len(members))) or not 0 <= plan["root"] < len(members):
        raise ValueError("ranks that do not count up, or a root that is none of them")
    if any(not MEMBER_HOST_PATTERN.fullmatch(member["host"]) for member in members):
        raise ValueError("a member on no host")
    right = (
        len(server) == 2 and matches_type(server[0], str) and matches_type(server[1], int) and 0 < server[1] < 1 << 16
    )
    if not right or not MEMBER_HOST_PATTERN.fullmatch(server[0]):
        raise ValueError(f"server {server!r:.100}")


def matches_type(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a type: a TypedDict, a list of one, a union, int, str, bool or None."""
    if kind is Any:
        return True
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        return isinstance(value, dict) and all(
            name in value and matches_type(value[name], hints[name]) for name in hints
        )
    if get_origin(kind) is list:
        return isinstance(value, list) and all(matches_type(one, get_args(kind)[0]) for one in value)
    if get_args(kind):
        return any(matches_type(value, one) for one in get_args(kind))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < RECORD_INTEGER_BOUND
    return isinstance(value, kind)
