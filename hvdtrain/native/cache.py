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
    """Return the user's folder of wheels."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hvdtrain" / "wheels"


def find_wheel(folder: Path) -> Path | None:
    """Return the wheel in a folder, or None."""
    wheels = sorted(folder.glob("horovod-*.whl"))
    return wheels[0] if wheels else None


def find_whole_wheel(folder: Path) -> tuple[Path | None, str]:
    """Return the wheel in one key's folder, if it is intact.

    Returns:
        The wheel, or None; and what is wrong with it, "" if it is intact or there is none.

    Raises:
        UserError: Another user may have put it there.
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
    """Raise UserError unless this user or root owns a file or folder, and nobody else may change it."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
        owner = f"belongs to user {status.st_uid}" if not status.st_mode & 0o002 else "can be changed by every user"
        raise UserError(f"{path} {owner}; expected only user {os.geteuid()}: remove it, or choose another --wheel-dir")


def checksum_path(wheel: Path) -> Path:
    """Return the path of the file with the SHA-256 of a stored wheel."""
    return wheel.with_name(f"{wheel.name}.sha256")


def hash_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def store_wheel(wheel: Path, folder: Path) -> Path:
    """Copy a wheel into a key's folder atomically, also if the machine stops.

    Returns:
        The wheel's new path.
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
        # First: if the copy then fails, an earlier wheel does not match and is built again.
        write_atomically(checksum_path(target), f"{hash_file(part)}\n".encode())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(folder)
    return target
