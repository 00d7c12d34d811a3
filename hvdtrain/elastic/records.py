"""The records that processes of an elastic run write for each other, and their check when they are read.

Records come from another process: one of another version, or one that went wrong. A value without exactly the fields
and types that its key promises is not a record, and counts as not written (hvdtrain/elastic/store.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hvdtrain.recipe.source_copy import RecipeCopy
from hvdtrain.system.records import encode_record, parse_record

T = TypeVar("T")

HOST_PATTERN = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Verdict:
    """How the run has ended."""

    code: int  # the exit code of all its processes
    error: str  # "" if there was none
    by: str = ""  # the supervisor that wrote it, "" for a worker

    def __post_init__(self) -> None:
        if not 0 <= self.code < 256:
            raise ValueError(f"exit code {self.code}")


@dataclass(frozen=True)
class PlannedMember:
    """A member of a generation, and the ranks that it has there."""

    id: str
    host: str
    rank: int
    local_rank: int
    local_size: int

    def __post_init__(self) -> None:
        check_host(self.host)


@dataclass(frozen=True)
class GenerationPlan:
    """A generation: who is in it, where its members meet, and whose state they take over."""

    members: list[PlannedMember]  # by rank
    servers: list[tuple[str, int]]  # address and port of each column's rendezvous server; one, if it is no grid
    root: int  # the rank whose state all take over
    step: int  # that this state has reached; -1: nobody has one
    error: str | None  # why there is no further generation

    def __post_init__(self) -> None:
        if [member.rank for member in self.members] != list(range(len(self.members))):
            raise ValueError("ranks that do not count up from 0")
        if not 0 <= self.root < len(self.members):
            raise ValueError(f"root {self.root} of {len(self.members)} ranks")
        if not self.servers or len(self.members) % len(self.servers):
            raise ValueError(f"{len(self.members)} members in {len(self.servers)} columns")
        for address, port in self.servers:
            check_host(address)
            if not 0 < port < 1 << 16:
                raise ValueError(f"port {port}")

    @property
    def replica_ranks(self) -> int:
        """How many members hold the model once: consecutive ones."""
        return len(self.servers)

    @property
    def member_ids(self) -> list[str]:
        """The members by rank."""
        return [member.id for member in self.members]


@dataclass(frozen=True)
class Candidate:
    """A worker that is ready for a generation."""

    step: int  # that its state has reached; -1: it has none
    host: str
    slot: int  # its local rank in horovodrun's list
    joined: bool  # an earlier generation

    def __post_init__(self) -> None:
        check_host(self.host)


@dataclass(frozen=True)
class ReplicaPlan:
    """Workers that build what they hold together, before any of them is in a generation."""

    members: list[str]  # by their places
    server: tuple[str, int]  # address and port of the store where they meet

    def __post_init__(self) -> None:
        check_host(self.server[0])


@dataclass(frozen=True)
class TrainingError:
    """An error of the recipe's code, which ended a generation."""

    step: int  # after which it came
    text: str


@dataclass(frozen=True)
class WorkerDeath:
    """How a worker that had joined a generation ended."""

    generation: int
    steps: int  # that were done
    cause: str  # "was killed by signal 11 (SIGSEGV)"
    what: str  # its last activity, "computing gradients"
    host: str

    def __post_init__(self) -> None:
        check_host(self.host)


@dataclass(frozen=True)
class Heartbeat:
    """A supervisor's sign of life."""

    beats: int  # increases
    member: str  # its worker
    host: str
    assigned_size: int  # of horovodrun's list of slots, when it last asked for it
    ending: bool  # it knows that the run ends, or leaves it
    drained: bool  # its slot is to leave the run
    joined: bool  # its worker is in the newest generation
    failed_starts: int  # of its workers, in a row: they ended before they joined a generation

    def __post_init__(self) -> None:
        check_host(self.host)


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A key of the store that is written once, or what the keys of several begin with; and the type of its value."""

    key: str
    kind: Any  # type[T], or Any for JSON that its reader checks
    pattern: str = ""  # of keys; "" for `key` alone

    def of(self, *parts: object) -> Fact[T]:
        """The fact of one generation, of one member, or both: `PLAN.of(3)` has the key plan-3."""
        return Fact("-".join(map(str, (self.key, *parts))), self.kind, self.pattern)

    def parse(self, key: str, text: bytes | str) -> T:
        """Return the value of a fact with this key or prefix. Raises ValueError if it is not valid."""
        if self.pattern and not re.fullmatch(self.pattern, key):
            raise ValueError("the key has an unknown form")
        value: T = parse_record(load_json(text), self.kind)
        return value


NUMBER = "[0-9]{1,9}"
VERDICT: Fact[Verdict] = Fact("verdict", Verdict)
PLAN: Fact[GenerationPlan] = Fact("plan", GenerationPlan, f"plan-{NUMBER}")  # by generation
# By generation and member; 0: for a replica, which is built before it is in one.
CANDIDATE: Fact[Candidate] = Fact("here", Candidate, f"here-{NUMBER}-.+")
REPLICA: Fact[ReplicaPlan] = Fact("replica", ReplicaPlan, "replica-.+")  # by its first member
FOLLOWS: Fact[bool] = Fact("follows", bool, f"follows-{NUMBER}-.+")  # by generation and member: it knows the plan
BEGAN: Fact[int] = Fact("began", int, f"began-{NUMBER}")  # by generation: the steps done when it began
ERROR: Fact[TrainingError] = Fact("error", TrainingError, f"error-{NUMBER}-.+")  # by generation and member
GONE: Fact[str] = Fact("gone", str, "gone-.+")  # by member: why it is not in the run any more
DEATH: Fact[WorkerDeath] = Fact("died", WorkerDeath, "died-.+")  # by member
FOLDER: Fact[str] = Fact("folder", str)  # the run folder, absolute, once a generation has begun in it
CHOSEN_FOLDER: Fact[str] = Fact("chosen_folder", str)  # the one that the first is to begin in, absolute
LAUNCH: Fact[str] = Fact("launch", str)  # the launch's name (hvdtrain/training/lease.py)
# What workers compare themselves with (hvdtrain/comm/agreement.py) and import (hvdtrain/recipe/source_copy.py).
AGREEMENT: Fact[Any] = Fact("agreement", Any)
SOURCE: Fact[RecipeCopy] = Fact("source", RecipeCopy)


def check_host(host: str) -> None:
    """Raise ValueError for a text that is not a host name or IPv4 address."""
    if not HOST_PATTERN.fullmatch(host):
        raise ValueError(f"host {host!r:.100}")


def dump_record(value: object) -> bytes:
    """Return a record, or plain data, as JSON."""
    return json.dumps(encode_record(value)).encode()


def load_json(text: bytes | str) -> Any:
    """Parse JSON. Raises ValueError, also for text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
