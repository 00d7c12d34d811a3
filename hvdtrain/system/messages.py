"""Lines by which a rank reports to `hvdtrain launch` what it does.

A rank started by `hvdtrain launch` (HVDTRAIN_LAUNCH=1) writes such a line to its standard output, which every
launcher brings to the launching host. The line is one write of `##hvdtrain NONCE` and a JSON object; launch takes it
out of the output. NONCE follows from the launch's secret: text that a rank only passes on cannot contain it. A line
counts only if the mark begins it; the carriage return that is written before ends a line that the rank left unfinished.
Kinds:

    started   {rank, host, pid}                            once, when Horovod is initialized; in an elastic run also
              {..., size, reach, supervisor}               for each generation; reach: what horovodrun calls the host;
                                                           supervisor: the process that stops the run if asked to
    standstill {rank, host, pid, what, collective,         when no step was made for long: see hvdtrain.system.activity
              where, step, seconds, waits, after}
    progress  {step, steps, epoch, loss, rate, text}       rank 0, a few times a second at most
    failed    {rank, host, pid, code, error, traceback,    once, when the rank ends badly; traceback may be ""; origin:
               origin, waits, ends}                        the rank that caused it, if all ranks end with this error;
                                                           waits: it hung while it waited for others; ends: a
                                                           supervisor ends the run by it (true), or its slot (false)
    finished  {rank, code}                                 once, at the end: code is 0 or 75
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hvdtrain.system import signed_http
from hvdtrain.system.strict_json import encode_json

HOST_PATTERN = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)  # never an option of ssh


def is_launched() -> bool:
    """Whether `hvdtrain launch` reads this process's output."""
    return os.environ.get("HVDTRAIN_LAUNCH") == "1"


def message_prefix(environ: Mapping[str, str]) -> str:
    """How the messages of the run begin whose secret is in an environment."""
    return f"##hvdtrain {signed_http.authenticate(signed_http.read_key(environ), 'messages')[:32]} "


def send_message(kind: str, **fields: Any) -> None:
    """Write one message to standard output, if `hvdtrain launch` reads it."""
    if is_launched():
        sys.stdout.flush()
        sys.stdout.write(f"\r{message_prefix(os.environ)}{encode_json({'kind': kind, **fields})}\n")
        sys.stdout.flush()


def parse_message(line: str, mark: str) -> dict[str, Any] | None:
    """The message in a line of output, or None if it is an ordinary line or no valid message."""
    if not line.startswith(mark):
        return None
    try:
        message = json.loads(line[len(mark) :])
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and is_valid_message(message) else None


def is_valid_message(message: Mapping[str, Any]) -> bool:
    """Whether a message has all fields of its kind, and each that it has is what it should be."""
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in REQUIRED_FIELDS:
        return False
    checked = all(is_right(message[name]) for name, is_right in FIELD_CHECKS.items() if name in message)
    return checked and all(name in message for name in REQUIRED_FIELDS[kind])


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0 up."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def is_number(value: object) -> bool:
    """Whether a value is a number, or None for an unknown one."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def is_text(value: object) -> bool:
    return isinstance(value, str)


REQUIRED_FIELDS = {
    "started": ("rank", "host", "pid"),
    "progress": (),
    "failed": ("rank",),
    "finished": ("rank", "code"),
    "standstill": ("rank", "host", "pid", "what", "collective", "where", "step", "seconds", "waits", "after"),
}
FIELD_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("rank", "code", "size"), is_count),
    **dict.fromkeys(("step", "steps", "epoch", "loss", "rate", "seconds", "after"), is_number),
    **dict.fromkeys(("waits", "ends"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("text", "error", "traceback", "what", "collective", "where"), is_text),
    **dict.fromkeys(("host", "reach"), lambda value: isinstance(value, str) and bool(HOST_PATTERN.fullmatch(value))),
    **dict.fromkeys(("pid", "supervisor"), lambda value: is_count(value) and value > 1),
}
