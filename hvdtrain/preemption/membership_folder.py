"""The membership folder: which hosts take part, and which of them are about to go.

Each host's agent writes, atomically:

    HOST.json      {host, slots, boot_id, pid, started, beat, state}   anew at every heartbeat; beat increases
    HOST.draining  {host, boot_id, deadline, seconds, source, reason}  once, when a notice comes

boot_id names one life of the host: a notice is for that life only. deadline is unix time by that host's own clock,
seconds what was left when the notice came; state is "live" or "draining".
cluster/discovery/membership.py reads the same folder without hvdtrain; its tests see to it that the two agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hvdtrain.system.files import write_json

KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
    """A host that is about to go."""

    host: str
    boot_id: str
    deadline: float
    seconds: float
    source: str
    reason: str


def host_record_path(folder: Path, host: str) -> Path:
    return folder / f"{host}.json"


def drain_notice_path(folder: Path, host: str) -> Path:
    return folder / f"{host}.draining"


def write_host_record(folder: Path, member: HostRecord) -> None:
    """Write HOST.json, atomically."""
    write_json(host_record_path(folder, member.host), asdict(member))


def write_drain_notice(folder: Path, draining: DrainNotice) -> None:
    """Write HOST.draining, atomically."""
    write_json(drain_notice_path(folder, draining.host), asdict(draining))


def read_host_record(folder: Path, host: str) -> HostRecord | None:
    """What HOST.json says; None if there is none, or it is no such record. Raises OSError."""
    record = read_record_fields(host_record_path(folder, host), HostRecord)
    return HostRecord(**record) if record is not None else None


def read_drain_notice(folder: Path, host: str) -> DrainNotice | None:
    """What HOST.draining says; None if there is none, or it is no such record. Raises OSError."""
    record = read_record_fields(drain_notice_path(folder, host), DrainNotice)
    return DrainNotice(**record) if record is not None else None


def read_record_fields(path: Path, kind: type[Any]) -> dict[str, Any] | None:
    """The fields of a dataclass from a JSON object; others, of a later version perhaps, are left out."""
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    names = [field.name for field in fields(kind)]
    if not isinstance(record, dict) or not all(name in record for name in names):
        return None
    return {name: record[name] for name in names}


def remove_host_record(folder: Path, host: str, boot_id: str, pid: int) -> None:
    """Remove HOST.json, unless another agent has written it. Raises OSError."""
    there = read_host_record(folder, host)
    if there is None or (there.boot_id, there.pid) == (boot_id, pid):
        host_record_path(folder, host).unlink(missing_ok=True)


def host_boot_id(environ: Mapping[str, str] = os.environ, *, slurm: bool = False) -> str:
    """What names this life of the host: the kernel's boot id.

    slurm: with the job and how often it was requeued, for Slurm takes the node from a job without a boot, and may
    give it back to the next.
    """
    boot = KERNEL_BOOT_ID.read_text().strip()
    if slurm and "SLURM_JOB_ID" in environ:
        return f"{boot}+{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    return boot
