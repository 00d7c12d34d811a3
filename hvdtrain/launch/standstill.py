"""Who hangs, put together from what all ranks report that they are in (hvdtrain.system.activity)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hvdtrain.system.activity import Standstill

COLLECT_SECONDS = 3.0  # seconds from the first rank's report to the line: the others' come meanwhile
MAX_NAMED_RANKS = 4
PROCESS_STATES = {
    "T": "it is stopped by a signal",
    "t": "it is stopped by a debugger",
    "D": "it waits for a disk or a network file system",
}


def parse_standstill(message: Mapping[str, Any]) -> Standstill | None:
    """The Standstill in a rank's message; None if it is not one."""
    what, collective, where = (message.get(name) for name in ("what", "collective", "where"))
    step, seconds, waits = message.get("step"), message.get("seconds"), message.get("waits")
    texts = isinstance(what, str) and isinstance(collective, str) and isinstance(where, str)
    numbers = isinstance(step, int) and all(isinstance(n, int | float) for n in (seconds, message.get("after")))
    if not (texts and numbers and isinstance(waits, bool)):
        return None
    return Standstill(str(what), str(collective), str(where), int(step or 0), float(seconds or 0), bool(waits))


def describe_standstill(reports: Mapping[str, Standstill], silent: Mapping[str, str], after: float) -> str:
    """One line on why no step is made: who is the cause, in what, and who waits for it; "" if nobody stands still.

    Args:
        reports: by `rank 1 on b`, what a rank is in.
        silent: the same of ranks that reported nothing, with why that may be, or "".
        after: seconds in one activity from which on it is worth a line.
    """
    if not any(stands.seconds >= after for stands in reports.values()):
        return ""
    busy = {name: stands for name, stands in reports.items() if not stands.waits}
    waiting = {name: stands for name, stands in reports.items() if stands.waits}
    # What holds up the others may have begun a little later than they began to wait.
    stuck = {name: stands for name, stands in busy.items() if stands.seconds >= after / 2}
    if stuck:
        causes = [f"{name} has been {stands} for {stands.seconds:.0f} s" for name, stands in stuck.items()]
    elif silent:
        causes = [f"{name} does not report what it does" + (f": {why}" if why else "") for name, why in silent.items()]
    elif busy:
        causes = [f"{name} is {stands}" for name, stands in busy.items()]
    else:
        waits = [f"{name} has waited for {stands.seconds:.0f} s while {stands}" for name, stands in waiting.items()]
        return f"{join_shortened(waits)}: they wait for each other" if len(waits) > 1 else join_shortened(waits)
    if not waiting:
        return join_shortened(causes)
    longest = max(waiting.values(), key=lambda stands: stands.seconds)
    whom = "it" if len(causes) == 1 else "them"
    rest = len(waiting) == len(reports) + len(silent) - len(causes)
    who = (
        "the others wait" if rest and len(waiting) > 1 else f"{join_shortened(waiting)} wait{'s' * (len(waiting) == 1)}"
    )
    return f"{join_shortened(causes)}; {who} for {whom} while {longest}"


def join_shortened(texts: Iterable[str]) -> str:
    """The first few texts, and how many more there are."""
    found = list(texts)
    more = f" and {len(found) - MAX_NAMED_RANKS} more" if len(found) > MAX_NAMED_RANKS else ""
    return ", ".join(found[:MAX_NAMED_RANKS]) + more


def describe_process_state(host: object, pid: object) -> str:
    """Why a process of this host may report nothing; "" if that is not known."""
    if host != socket.gethostname():
        return ""
    with contextlib.suppress(OSError, IndexError):
        return PROCESS_STATES.get(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0], "")
    return ""
