"""The membership folder: which hosts take part, and which of them will be preempted.

Each host's agent writes, atomically:

    HOST.json      {host, slots, boot_id, pid, started, beat, state}   at every heartbeat; beat increases
    HOST.draining  {host, boot_id, deadline, seconds, source, reason}  once, when a notice comes

boot_id names one life of the host: a notice is for that life only. deadline is unix time by that host's own clock,
seconds is what was left when the notice came; state is "live" or "draining".
`hvdtrain discover membership` (hvdtrain.launch.discovery.membership) reads the folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from hvdtrain.system.files import write_json
from hvdtrain.system.records import parse_record

R = TypeVar("R", "HostRecord", "DrainNotice")


@dataclass(frozen=True)
class HostRecord:
    """A host, as its agent sees it."""

    host: str
    slots: int
    boot_id: str
    pid: int
    started: float
    beat: int
    state: str


@dataclass(frozen=True)
class DrainNotice:
    """A host that will be preempted."""

    host: str
    boot_id: str
    deadline: float
    seconds: float
    source: str
    reason: str


def host_record_path(folder: Path, host: str) -> Path:
    """Return the path of HOST.json."""
    return folder / f"{host}.json"


def drain_notice_path(folder: Path, host: str) -> Path:
    """Return the path of HOST.draining."""
    return folder / f"{host}.draining"


def write_host_record(folder: Path, member: HostRecord) -> None:
    """Write HOST.json, atomically."""
    write_json(host_record_path(folder, member.host), asdict(member))


def write_drain_notice(folder: Path, draining: DrainNotice) -> None:
    """Write HOST.draining, atomically."""
    write_json(drain_notice_path(folder, draining.host), asdict(draining))


def read_host_record(folder: Path, host: str) -> HostRecord | None:
    """Return what HOST.json says, or None if there is no such file or it is invalid. Raises OSError."""
    return _read_record(host_record_path(folder, host), HostRecord)


def read_drain_notice(folder: Path, host: str) -> DrainNotice | None:
    """Return what HOST.draining says, or None if there is no such file or it is invalid. Raises OSError."""
    return _read_record(drain_notice_path(folder, host), DrainNotice)


def _read_record(path: Path, kind: type[R]) -> R | None:
    try:
        record: R = parse_record(json.loads(path.read_bytes()), kind)
    except (FileNotFoundError, ValueError):
        return None
    return record


def remove_host_record(folder: Path, host: str, boot_id: str, pid: int) -> None:
    """Remove HOST.json, unless another agent has written it. Raises OSError."""
    there = read_host_record(folder, host)
    if there is None or (there.boot_id, there.pid) == (boot_id, pid):
        host_record_path(folder, host).unlink(missing_ok=True)
