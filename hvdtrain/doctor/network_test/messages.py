"""What the coordinator and the workers of the network test send to each other, one signed line of JSON each.

coordinator                                     worker
NONCE                                     ->
                                          <-    NONCE Hello
MeasureCpu | ProbeLink | ServeProbe       ->
    | RunAllReduces, each with a number   <-    CpuReply | ProbeReply | ServeReply | AllReduceReply | Failure,
...                                             with the number of the command
EndTest                                   ->    ends
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from hvdtrain.system.records import encode_record, parse_record

Pair: TypeAlias = tuple[int, int]  # two ranks; a direction from the first to the second where order matters


@dataclass(frozen=True)
class Hello:
    """A worker's first line: its rank, and the address and port at which other workers connect to it."""

    rank: int
    address: tuple[str, int]


@dataclass(frozen=True)
class MeasureCpu:
    """Measure how much slower this host's CPU is than an idle one's."""


@dataclass(frozen=True)
class ProbeLink:
    """Measure the link to another worker, which has got ServeProbe with the same ticket; send for some seconds."""

    address: tuple[str, int]
    ticket: str
    seconds: float


@dataclass(frozen=True)
class ServeProbe:
    """Answer the worker that shows this ticket, and measure how fast it sends."""

    ticket: str


@dataclass(frozen=True)
class RunAllReduces:
    """Start Horovod and all-reduce over these pairs of ranks in this order."""

    pairs: list[Pair]


@dataclass(frozen=True)
class EndTest:
    """End this worker."""


@dataclass(frozen=True)
class CpuReply:
    """The CPU slowdown: wall time of a piece of work over its CPU time, 1 on an idle host."""

    slowdown: float


@dataclass(frozen=True)
class ProbeReply:
    """The median round trip in seconds."""

    round_trip: float


@dataclass(frozen=True)
class ServeReply:
    """The rate at which the other worker sent, in bits per second."""

    rate: float


@dataclass(frozen=True)
class AllReduceResult:
    """The median seconds of all-reduces over a pair, and whether their sum was right."""

    pair: Pair
    seconds: float
    right: bool


@dataclass(frozen=True)
class AllReduceReply:
    """The results for the pairs that this worker's rank is in."""

    results: list[AllReduceResult]


@dataclass(frozen=True)
class Failure:
    """Why there is no other reply."""

    error: str


Command: TypeAlias = MeasureCpu | ProbeLink | ServeProbe | RunAllReduces | EndTest
Reply: TypeAlias = CpuReply | ProbeReply | ServeReply | AllReduceReply | Failure
COMMANDS = {kind.__name__: kind for kind in (MeasureCpu, ProbeLink, ServeProbe, RunAllReduces, EndTest)}
REPLIES = {kind.__name__: kind for kind in (CpuReply, ProbeReply, ServeReply, AllReduceReply, Failure)}


def encode_message(number: int, message: Command | Reply) -> dict[str, object]:
    """Return a command or a reply with its number as a JSON object."""
    return {"kind": type(message).__name__, "number": number, "content": encode_record(message)}


@dataclass(frozen=True)
class _Envelope:
    kind: str
    number: int
    content: Any


def parse_command(value: Any) -> tuple[int, Command]:
    """Return the number and the command of a JSON value. Raises ValueError."""
    number, command = _parse_message(value, COMMANDS)
    return number, command


def parse_reply(value: Any) -> tuple[int, Reply]:
    """Return the number and the reply of a JSON value. Raises ValueError."""
    number, reply = _parse_message(value, REPLIES)
    return number, reply


def _parse_message(value: Any, kinds: Mapping[str, type]) -> tuple[int, Any]:
    envelope: _Envelope = parse_record(value, _Envelope)
    if envelope.kind not in kinds:
        raise ValueError(f"unknown message {envelope.kind!r:.100}")
    return envelope.number, parse_record(envelope.content, kinds[envelope.kind])
