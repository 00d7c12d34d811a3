"""Writing so that a crash leaves the old file or the new one, never half of one, and a full disk loses nothing."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what may be otherwise a little later
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # from file systems without hard links


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename over `path`, fsync the folder."""
    beside = path.with_name(f".{path.name}.new")
    _write_whole(beside, data)
    beside.replace(path)
    sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Likewise, but never over another file. Raises FileExistsError, to one of two that write at the same time."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    _write_whole(beside, data)
    try:
        path.hardlink_to(beside)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666))  # empty for a moment
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write_whole(path: Path, data: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)  # a full disk needs the room
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trouble(what: str, folder: Path, error: OSError) -> str:
    """That something cannot be written in a folder, and why, for people; with what room there is on a full disk."""
    text = f"cannot write {what} in {folder}: {error.strerror}"
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return f"{text} ({shutil.disk_usage(there).free >> 10:,} KiB free)" if error.errno in NO_ROOM else text


class Growing:
    """A file that is only appended to. What the disk has no room for is kept in memory, and written when it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None  # why not all is written
        self._held = bytearray()
        self._file: int | None = None

    def write(self, data: bytes) -> None:
        """Append, now or later. Raises OSError for what more room would not mend."""
        self._held += data
        self.flush()

    def flush(self) -> None:
        """Write what is held, as far as there is room."""
        self.error = None
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while self._held:
                # What was written of a line stands; the rest follows it.
                del self._held[: os.write(self._file, self._held)]
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.error = error

    def close(self) -> None:
        """Write no longer; what is held then is lost."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
