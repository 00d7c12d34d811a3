"""Where built wheels are kept: <folder>/<key>/horovod-...whl, with its SHA-256 and the log of the build."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from hvdtrain.system.errors import UserError
from hvdtrain.system.files import sync_folder, write_atomically


def wheel_folder() -> Path:
    """The user's folder of wheels."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hvdtrain" / "wheels"


def find_wheel(folder: Path) -> Path | None:
    """The wheel in a folder, or None."""
    wheels = sorted(folder.glob("horovod-*.whl"))
    return wheels[0] if wheels else None


def find_whole_wheel(folder: Path) -> tuple[Path | None, str]:
    """The wheel in one key's folder, if it is as it was stored; and why it is not, "" if it is or there is none.

    Raises:
        UserError: another user may have put it there.
    """
    wheel = find_wheel(folder)
    if wheel is None:
        return None, ""
    refuse_others(folder)
    refuse_others(wheel)
    try:
        expected = checksum_path(wheel).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None, f"{wheel} has no checksum"
    found = hash_file(wheel)
    return (wheel, "") if found == expected else (None, f"{wheel} is damaged: SHA-256 {found}, expected {expected}")


def refuse_others(path: Path) -> None:
    """Raise UserError if another user than this one, or root, owns a file or folder, or anybody may change it."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
        owner = f"belongs to user {status.st_uid}" if not status.st_mode & 0o002 else "can be changed by everybody"
        raise UserError(f"{path} {owner}; expected user {os.geteuid()} alone: remove it, or give another --wheel-dir")


def checksum_path(wheel: Path) -> Path:
    """Where the SHA-256 of a stored wheel is kept."""
    return wheel.with_name(f"{wheel.name}.sha256")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def store(wheel: Path, folder: Path) -> Path:
    """Put a wheel into a key's folder: it is there whole or not at all, also if the machine stops.

    Returns:
        the wheel's new path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".part-")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, wheel.open("rb") as source:
            shutil.copyfileobj(source, out)
            out.flush()
            os.fsync(out.fileno())
        part.chmod(0o644)
        target = folder / wheel.name
        # First: a wheel of before does not fit it then, and is built again.
        write_atomically(checksum_path(target), f"{hash_file(part)}\n".encode())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(folder)
    return target
