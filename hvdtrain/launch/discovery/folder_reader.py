"""Reads a membership folder in bounded time, whatever the file system does."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdtrain.launch.hosts import HOST_NAME, MAX_SLOTS_PER_HOST
from hvdtrain.preemption.membership_folder import drain_notice_path, host_record_path
from hvdtrain.system.errors import RunError

LOCK_POLL_SECONDS = 0.02
PIPE_BYTES = 1 << 16


@dataclass(frozen=True)
class Member:
    """A host as the folder has it now.

    Attributes:
        slots: how many ranks it takes.
        boot_id: one life of the host.
        beat: started, pid and beat of its agent: different after each heartbeat.
        draining: there is a notice for this life.
    """

    slots: int
    boot_id: str
    beat: list[float]
    draining: bool


def read_in_time(folder: Path, limit: float, lock: Path) -> dict[str, Member]:
    """Return what the folder holds.

    A process of its own reads it: one that hangs in a dead file system cannot be interrupted, at times not even killed.
    While it exists it holds the lock, so that a call every second does not add one each. It is nobody's child, for
    whoever ends would wait for it.

    Raises:
        RunError: the folder cannot be read, or has not answered within `limit` seconds.
    """
    deadline = boot_clock() + limit
    held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if boot_clock() >= deadline:
                raise RunError("an earlier call still waits for the file system") from None
            time.sleep(LOCK_POLL_SECONDS)
    receive, send = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - boot_clock()))  # ends the reader
            send_members(folder, send)
        os._exit(0)
    os.waitpid(parent, 0)
    os.close(send)
    os.close(held)  # the reader has it, too
    data = b""
    while select.select([receive], [], [], max(0.0, deadline - boot_clock()))[0]:
        chunk = os.read(receive, PIPE_BYTES)
        if not chunk:
            break
        data += chunk
    else:
        data = b""
    os.close(receive)
    if not data:
        raise RunError(f"no answer from the file system within {limit:g} s")
    found = json.loads(data)
    if "error" in found:
        raise RunError(found["error"])
    return {name: Member(**member) for name, member in found["members"].items()}


def send_members(folder: Path, pipe: int) -> None:
    """Write the folder's members, or why it cannot be read, to a pipe as JSON; run in a process of its own."""
    # Nobody who waits for the end of the command's output must wait for this process.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        text = json.dumps({"members": {name: asdict(member) for name, member in read_members(folder).items()}})
    except Exception as error:
        text = json.dumps({"error": getattr(error, "strerror", None) or repr(error)})
    with os.fdopen(pipe, "w") as out:
        out.write(text)


def read_members(folder: Path) -> dict[str, Member]:
    """Return the hosts of the folder; a file that is not a host's record is ignored. Raises OSError."""
    members = {}
    for path in folder.iterdir():
        if path.suffix == ".json" and HOST_NAME.match(path.stem):
            member = read_member(folder, path.stem)
            if member is not None:
                members[path.stem] = member
    return members


def read_member(folder: Path, host: str) -> Member | None:
    """Return what the folder holds of a host; None if that is not a record of it.

    A notice that is not valid counts: it is there to keep the host out.
    """
    record = read_object(host_record_path(folder, host)) or {}
    slots, boot_id = record.get("slots"), record.get("boot_id")
    numbers = [record.get(name) for name in ("started", "pid", "beat")]
    beat = [number for number in numbers if isinstance(number, int | float)]
    if record.get("host") != host or not isinstance(boot_id, str) or len(beat) < len(numbers):
        return None
    if type(slots) is not int or not 0 < slots <= MAX_SLOTS_PER_HOST:
        return None
    notice = read_object(drain_notice_path(folder, host))
    draining = notice is not None and notice.get("boot_id", boot_id) == boot_id
    return Member(slots, boot_id, beat, draining)


def read_object(path: Path) -> dict[str, object] | None:
    """Return the JSON object in a file; an empty one if the file holds something else; None if there is no file."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def boot_clock() -> float:
    """Return seconds since this machine's boot, those asleep included: the same in all processes, and never set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
