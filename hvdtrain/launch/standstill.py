"""Which rank hangs, concluded from what all ranks report that they are in (hvdtrain.system.activity)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from hvdtrain.system.activity import Standstill

MAX_NAMED_RANKS = 4
PROCESS_STATES = {
    "T": "it is stopped by a signal",
    "t": "it is stopped by a debugger",
    "D": "it waits for a disk or a network file system",
}


def describe_standstill(reports: Mapping[str, Standstill], silent: Mapping[str, str], after: float) -> str:
    """Return why no step is made, in a line: which rank is the cause, in what, and which wait for it; "" if none is.

    Args:
        reports: by `rank 1 on b`, what a rank is in.
        silent: by the same names, why ranks that reported nothing may not have, or "".
        after: seconds in one activity from which on it is worth a line.
    """
    if not any(activity.seconds >= after for activity in reports.values()):
        return ""
    busy = {name: activity for name, activity in reports.items() if not activity.waits}
    waiting = {name: activity for name, activity in reports.items() if activity.waits}
    # The cause may have begun a little later than the others began to wait.
    stuck = {name: activity for name, activity in busy.items() if activity.seconds >= after / 2}
    if stuck:
        causes = [f"{name} has been {activity} for {activity.seconds:.0f} s" for name, activity in stuck.items()]
    elif silent:
        causes = [f"{name} does not report what it does" + (f": {why}" if why else "") for name, why in silent.items()]
    elif busy:
        causes = [f"{name} is {activity}" for name, activity in busy.items()]
    else:
        waits = [
            f"{name} has waited for {activity.seconds:.0f} s while {activity}" for name, activity in waiting.items()
        ]
        return f"{join_shortened(waits)}: they wait for each other" if len(waits) > 1 else join_shortened(waits)
    if not waiting:
        return join_shortened(causes)
    longest = max(waiting.values(), key=lambda activity: activity.seconds)
    whom = "it" if len(causes) == 1 else "them"
    rest = len(waiting) == len(reports) + len(silent) - len(causes)
    who = (
        "the others wait" if rest and len(waiting) > 1 else f"{join_shortened(waiting)} wait{'s' * (len(waiting) == 1)}"
    )
    return f"{join_shortened(causes)}; {who} for {whom} while {longest}"


def join_shortened(texts: Iterable[str]) -> str:
    """Return the first few texts, and how many more there are."""
    found = list(texts)
    more = f" and {len(found) - MAX_NAMED_RANKS} more" if len(found) > MAX_NAMED_RANKS else ""
    return ", ".join(found[:MAX_NAMED_RANKS]) + more


def describe_process_state(host: object, pid: object) -> str:
    """Return why a process of this host may report nothing; "" if that is not known."""
    if host != socket.gethostname():
        return ""
    with contextlib.suppress(OSError, IndexError):
        return PROCESS_STATES.get(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0], "")
    return ""
