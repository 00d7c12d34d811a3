"""Which process on which machine owns a run folder, and whether it is still alive."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hvdtrain.system.strict_json import check_count, check_entries, check_finite_number, encode_json, parse_strict_json

MIN_OWNER_FILE_BYTES = 1024  # bytes, at least, of owner.json
MAX_LEASE_SECONDS = 604_800  # seconds of a lease
UNKNOWN_START_TIME = -1  # when a process started, if the system hides it


@dataclass(frozen=True)
class Owner:
    """Who holds a lease: the fields are the keys of owner.json."""

    launch: str  # random; the same for all processes of a launch that may hold the lease one after the other
    token: str  # random, of this holding of the lease
    host: str
    machine: str  # hash of the machine's own name for itself, "" if it has none
    boot: str  # random, of the machine's last start
    namespace: str  # in which `pid` counts
    pid: int
    started: int  # when the process was, in clock ticks since the boot
    seconds: float  # without a renewal after which the lease may be taken over

    @staticmethod
    def for_this_process(launch: str, seconds: float) -> Owner:
        """Return this process as a holder."""
        return Owner(
            launch=launch,
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=hashlib.sha256(name.encode()).hexdigest()[:16] if (name := _read_text("/etc/machine-id")) else "",
            boot=_read_text("/proc/sys/kernel/random/boot_id"),
            namespace=_read_pid_namespace(),
            pid=os.getpid(),
            started=_process_start_time(os.getpid()) or 0,
            seconds=seconds,
        )

    def encode(self) -> bytes:
        """Return the bytes of owner.json: always equally many, so that one owner can overwrite another in place."""
        return encode_json(asdict(self), indent=2).encode().ljust(MIN_OWNER_FILE_BYTES - 1) + b"\n"

    @staticmethod
    def decode(data: bytes) -> Owner | None:
        """Return the owner that owner.json names, None if it is not complete and valid."""
        try:
            entries = check_entries(parse_strict_json(data), "", *(field.name for field in fields(Owner)))
            for name, value in entries.items():
                if name in ("pid", "started"):
                    check_count(value, name)
                elif name == "seconds":
                    entries[name] = check_finite_number(value, name)
                    if not 0 < entries[name] <= MAX_LEASE_SECONDS:
                        return None
                elif not isinstance(value, str):
                    return None
            return Owner(**entries)
        except ValueError:
            return None

    def is_dead(self, here: Owner) -> bool:
        """Return whether the process has certainly ended, as seen from `here`."""
        if self.is_local(here):
            return _process_start_time(self.pid) not in (UNKNOWN_START_TIME, self.started)
        rebooted = bool(self.boot) and self.boot != here.boot
        return rebooted and bool(self.machine) and (self.host, self.machine) == (here.host, here.machine)

    def is_local(self, here: Owner) -> bool:
        """Return whether it is a process of this machine, so that `is_dead` can check it."""
        return bool(self.boot) and self.boot == here.boot and self.namespace == here.namespace


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _read_pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _process_start_time(pid: int) -> int | None:
    """Return when a living process started, in clock ticks since the boot; None if there is no such process."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # of another user
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return UNKNOWN_START_TIME
    return None if status[0] in "ZX" else int(status[19])
