"""Messages by which a rank reports to `hvdtrain launch` what it does: one dataclass for each kind.

A rank started by `hvdtrain launch` (HVDTRAIN_LAUNCH=1) writes a message as a line to its standard output, which every
launcher brings to the launching host. The line is one write of `##hvdtrain NONCE ` and a JSON object with the message's
`kind` and its fields, without those that are None; launch takes it out of the output. NONCE follows from the launch's
secret, so that text that a rank only passes on cannot contain it. A line is a message only if the mark begins it; the
carriage return written before it ends a line that the rank left unfinished.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeAlias

from hvdtrain.system import signed_http
from hvdtrain.system.activity import Standstill
from hvdtrain.system.errors import EXIT_FAILED
from hvdtrain.system.strict_json import JsonObject, encode_json, parse_strict_json

HOST_PATTERN = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)  # never an option of ssh


@dataclass(frozen=True)
class RankStarted:
    """Horovod is initialized: sent once, in an elastic run once for each generation.

    Attributes:
        rank: its rank, in an elastic run that in the generation.
        host: what it calls its host.
        pid: its process ID.
        size: the number of ranks of the generation; None if the run is not elastic.
        reach: what horovodrun calls the host, in an elastic run.
        supervisor: the process ID of its supervisor, which stops the run if asked to; None if the run is not elastic.
    """

    kind: ClassVar = "started"
    rank: int
    host: str
    pid: int
    size: int | None = None
    reach: str | None = None
    supervisor: int | None = None


@dataclass(frozen=True)
class RankProgress:
    """How far training is: sent by rank 0, a few times a second at most.

    Attributes:
        step, steps: steps done and in all.
        epoch: the epoch, from 1.
        loss: of the step.
        rate: examples per second.
        text: anything else to show, or "".
    """

    kind: ClassVar = "progress"
    step: float | None = None
    steps: float | None = None
    epoch: float | None = None
    loss: float | None = None
    rate: float | None = None
    text: str = ""

    def describe(self) -> str:
        """Return what to show next to a bar of steps: `epoch 3  loss 0.1234  812 samples/s` and the text."""
        formats = (("epoch {}", self.epoch), ("loss {:.4f}", self.loss), ("{:,.0f} samples/s", self.rate))
        parts = [form.format(value) for form, value in formats if value is not None]
        return "  ".join([*parts, self.text] if self.text else parts)


@dataclass(frozen=True)
class RankReport:
    """A line of the run's report, which launch prints without the rank: sent by rank 0."""

    kind: ClassVar = "report"
    rank: int
    text: str


@dataclass(frozen=True)
class RankFailed:
    """The rank ends badly: sent once.

    Attributes:
        rank, host, pid: as in RankStarted; a supervisor that sends this gives its own process ID.
        code: the exit code.
        error: why, in a line.
        traceback: Python's, or "".
        origin: the rank that caused it, if all ranks end with this error; else None.
        waits: whether it hung while it waited for other ranks; of a program, whether it has lost one.
        ends: whether a supervisor ends the whole run by it, or only its slot; None if a rank sends this.
    """

    kind: ClassVar = "failed"
    rank: int
    host: str | None = None
    pid: int | None = None
    code: int = EXIT_FAILED
    error: str = ""
    traceback: str = ""
    origin: int | None = None
    waits: bool = False
    ends: bool | None = None


@dataclass(frozen=True)
class RankFinished:
    """The rank is done: sent once, at the end; the exit code is 0, or 75 if the run is to be resumed.

    A program's rank sends it also if it was stopped, with any exit code, and with host and pid as in RankStarted.
    """

    kind: ClassVar = "finished"
    rank: int
    code: int
    host: str | None = None
    pid: int | None = None


@dataclass(frozen=True)
class RankStandstill:
    """No step was made for long: what this rank is in, as in `hvdtrain.system.activity.Standstill`.

    Attributes:
        after: seconds in one activity from which on it is worth a line.
    """

    kind: ClassVar = "standstill"
    rank: int
    host: str
    pid: int
    what: str
    collective: str
    where: str
    step: int
    seconds: float
    waits: bool
    after: float

    def standstill(self) -> Standstill:
        """Return what the rank is in."""
        return Standstill(self.what, self.collective, self.where, self.step, self.seconds, self.waits)


RankMessage: TypeAlias = RankStarted | RankProgress | RankReport | RankFailed | RankFinished | RankStandstill
MESSAGE_CLASSES: dict[str, type[RankMessage]] = {
    message.kind: message
    for message in (RankStarted, RankProgress, RankReport, RankFailed, RankFinished, RankStandstill)
}


def is_launched() -> bool:
    """Return whether `hvdtrain launch` reads this process's output."""
    return os.environ.get("HVDTRAIN_LAUNCH") == "1"


def message_prefix(environ: Mapping[str, str]) -> str:
    """Return how the messages of the run begin whose secret is in an environment."""
    return f"##hvdtrain {signed_http.authenticate(signed_http.read_key(environ), 'messages')[:32]} "


def send_message(message: RankMessage) -> None:
    """Write a message to standard output, if `hvdtrain launch` reads it."""
    if is_launched():
        sys.stdout.flush()
        sys.stdout.write(f"\r{message_prefix(os.environ)}{encode_json(message_fields(message))}\n")
        sys.stdout.flush()


def message_fields(message: RankMessage) -> JsonObject:
    """Return a message as it is sent: its kind, and its fields that are not None."""
    values = {one.name: getattr(message, one.name) for one in fields(message)}
    return {"kind": message.kind, **{name: value for name, value in values.items() if value is not None}}


def parse_message(line: str, mark: str) -> RankMessage | None:
    """Return the message in a line of output, or None if it is an ordinary line or an invalid message.

    Fields that the message's class does not have are ignored, so that another version can add some.
    """
    if not line.startswith(mark):
        return None
    try:
        content = parse_strict_json(line[len(mark) :].encode())
    except ValueError:
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    message = MESSAGE_CLASSES.get(kind) if isinstance(kind, str) else None
    if message is None:
        return None
    known = [one for one in fields(message) if content.get(one.name) is not None]
    missing = [one for one in fields(message) if one.default is MISSING and one not in known]
    if missing or not all(FIELD_CHECKS[one.name](content[one.name]) for one in known):
        return None
    return message(**{one.name: content[one.name] for one in known})


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from 0 up."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def is_number(value: object) -> bool:
    """Return whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Return whether a value is text."""
    return isinstance(value, str)


def is_host_name(value: object) -> bool:
    """Return whether a value is a name that a host can have."""
    return isinstance(value, str) and bool(HOST_PATTERN.fullmatch(value))


FIELD_CHECKS: dict[str, Callable[[Any], bool]] = {  # Any: values of JSON, before they are checked
    **dict.fromkeys(("rank", "code", "size", "origin"), is_count),
    **dict.fromkeys(("step", "steps", "epoch", "loss", "rate", "seconds", "after"), is_number),
    **dict.fromkeys(("waits", "ends"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("text", "error", "traceback", "what", "collective", "where"), is_text),
    **dict.fromkeys(("host", "reach"), is_host_name),
    **dict.fromkeys(("pid", "supervisor"), lambda value: is_count(value) and value > 1),
}
