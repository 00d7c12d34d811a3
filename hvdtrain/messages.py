"""Lines by which a rank tells `hvdtrain launch` what it does.

A rank started by `hvdtrain launch` (HVDTRAIN_LAUNCH=1) writes such a line to its standard output, which every
launcher brings to the launching host. The line is one write of MARK and a JSON object; launch takes it out of the
output. Kinds:

    started   {rank, host, pid}                            once, when Horovod is initialized; in an elastic run also
              {..., size, reach}                           for each generation; reach: what horovodrun calls the host
    standstill {rank, host, pid, what, collective, where, step, seconds, waits, after}   see hvdtrain.activity
    progress  {step, steps, epoch, loss, rate, text}       rank 0, a few times a second at most
    failed    {rank, host, pid, code, error, traceback,    once, when the rank ends badly; traceback may be ""; origin:
               origin}                                     the rank that caused it, if all ranks end with this error
    finished  {rank, code}                                 once, at the end: code is 0 or 75
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from hvdtrain.strict_json import encode_json

MARK = "##hvdtrain "


def launched() -> bool:
    """Whether `hvdtrain launch` reads this process's output."""
    return os.environ.get("HVDTRAIN_LAUNCH") == "1"


def send(kind: str, **fields: Any) -> None:
    """Write one message to standard output, if `hvdtrain launch` reads it."""
    if launched():
        sys.stdout.flush()
        sys.stdout.write(f"{MARK}{encode_json({'kind': kind, **fields})}\n")
        sys.stdout.flush()


def parse(line: str) -> dict[str, Any] | None:
    """The message in a line of output, or None if it is an ordinary line."""
    if not line.startswith(MARK):
        return None
    try:
        message = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return message if isinstance(message, dict) and "kind" in message else None
