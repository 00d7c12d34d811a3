"""Write files so that a crash never leaves half of one, and a full disk loses nothing.

    write_atomically, create_atomically, write_json   a whole file, or an OSError
    BufferedDocument     a whole file, now or once the disk has room again: for what training must not stop for
    BufferedAppender     the same for a file that grows

The ledger (hvdtrain.ledger.writer) keeps its rows itself, as other ranks do, and begins a new segment with them instead
of continuing a file. A checkpoint is not buffered: saving it is tried again at the next step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdtrain.system.strict_json import encode_json

DISK_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # whose cause the free space helps to find
UNSUPPORTED_LINK_ERRORS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # from file systems without hard links
SHARED_MODE, PRIVATE_MODE = 0o666, 0o600  # modes of new files, before the umask


def write_atomically(path: Path, data: bytes, mode: int = SHARED_MODE) -> None:
    """Write to a file next to `path`, fsync it, rename it over `path`, fsync the folder."""
    temporary = path.with_name(f".{path.name}.new")
    _write_and_sync(temporary, data, mode)
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_atomically(path: Path, data: bytes, mode: int = SHARED_MODE) -> None:
    """Write likewise, but never over another file. Raises FileExistsError, to one of two concurrent writers."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    _write_and_sync(temporary, data, mode)
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in UNSUPPORTED_LINK_ERRORS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, mode))  # empty for a moment
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write_and_sync(path: Path, data: bytes, mode: int) -> None:
    path.unlink(missing_ok=True)  # left by a process that was killed
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # gives a full disk its space back
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write so that readers see the old file or the new one, also if several processes write at the same time.

    Unlike `write_atomically` it does not wait for the disk: it is for files that do not matter after a crash.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.write_bytes(data)
    beside.replace(path)


def write_json(path: Path, value: Any, mode: int = SHARED_MODE) -> None:
    """Write a value as indented JSON, atomically; numbers that are not finite become null."""
    write_atomically(path, (encode_json(value, indent=2) + "\n").encode(), mode)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error_text(what: str, folder: Path, error: OSError) -> str:
    """Describe a write error: what cannot be written in which folder and why, and the free space if that may matter."""
    text = f"cannot write {what} in {folder}: {error.strerror or error}"
    if error.errno in DISK_SPACE_ERRORS:
        with contextlib.suppress(OSError):
            there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
            text += f" ({shutil.disk_usage(there).free >> 10:,} KiB free)"
    return text


def is_same_file(path: Path, known: os.stat_result) -> bool:
    """Return whether a path still leads to the file or folder with this status; True if that cannot be found out."""
    try:
        return os.path.samestat(path.stat(), known)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


class BufferedDocument:
    """A JSON file that is written as a whole. What cannot be written now is held, and written when it can be.

    Attributes:
        path: the file.
        error: why the last content is not written yet; None if it is.
    """

    def __init__(self, path: Path) -> None:
        """Write nothing yet."""
        self.path = path
        self.error: OSError | None = None
        self._pending: Any = None  # Any: a value for JSON

    def hold(self, value: Any) -> None:
        """Replace the content with a value for JSON, which the next `flush` writes; None for nothing to write."""
        self._pending = value
        self.error = self.error if value is not None else None

    def flush(self) -> None:
        """Write what is held, if that is possible; `error` says why not."""
        if self._pending is None:
            return
        try:
            write_json(self.path, self._pending)
            self._pending = self.error = None
        except OSError as error:
            self.error = error


class BufferedAppender:
    """A file that is only appended to. What cannot be written now is held in memory, and written when it can be.

    After an error of any kind the file is opened again. After a failed fsync, everything since the last successful one
    is written again, since the system may have lost it.

    Attributes:
        path: the file.
        error: why data is held in memory; None if all is written.
    """

    def __init__(self, path: Path, prepare: Callable[[], bytes] = lambda: b"") -> None:
        """Write nothing yet.

        Args:
            path: the file.
            prepare: called before the file is first opened, again as long as it raises OSError; what it returns is
                written first.
        """
        self.path = path
        self._prepare: Callable[[], bytes] | None = prepare
        self.error: OSError | None = None
        self._pending = bytearray()  # not written yet
        self._unsynced = bytearray()  # written since the last fsync
        self._file_status: os.stat_result | None = None  # identifies the file; None until it is opened
        self._synced_size = 0  # bytes in the file at the last fsync, or when it was first opened
        self._truncate_on_open = False  # to _synced_size, as what follows is written again
        self._file: int | None = None

    def write(self, data: bytes) -> None:
        """Append data, now or later."""
        self._pending += data
        self.flush()

    def flush(self) -> None:
        """Write what is held, as far as that is possible; `error` says why not."""
        try:
            if self._file is None:
                self._file = self._open_file()
            while self._pending:
                # A part of a line that was written stays; the rest is written after it.
                count = os.write(self._file, self._pending)
                self._unsynced += self._pending[:count]
                del self._pending[:count]
            self.error = None
        except OSError as error:
            self._record_error(error)

    def _open_file(self) -> int:
        # A file that was deleted meanwhile is not created again: its rows would be in two places.
        create = os.O_CREAT if self._file_status is None else 0
        if self._prepare is not None:
            self._pending[:0] = self._prepare()
            self._prepare = None
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | create, SHARED_MODE)
        try:
            now = os.fstat(file)
            if self._file_status is None:
                self._file_status, self._synced_size = now, now.st_size
            if not os.path.samestat(self._file_status, now):
                raise FileNotFoundError(errno.ENOENT, "another file has taken its place")
            if self._truncate_on_open:
                os.ftruncate(file, self._synced_size)
                self._truncate_on_open = False
        except OSError:
            os.close(file)
            raise
        return file

    def _record_error(self, error: OSError) -> None:
        self.error = error
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None

    def sync_to_disk(self) -> None:
        """Write what is held so that it survives a crash of the machine. Raises OSError if that fails."""
        self.flush()
        if self.error is None and self._file is not None:
            try:
                os.fsync(self._file)
                self._synced_size = os.fstat(self._file).st_size
                self._unsynced.clear()
            except OSError as error:
                self._pending[:0] = self._unsynced
                self._unsynced.clear()
                self._truncate_on_open = True
                self._record_error(error)
        if self.error is not None:
            raise self.error

    def is_file_in_place(self) -> bool:
        """Return whether the path still leads to the file that is written to."""
        return self._file_status is None or is_same_file(self.path, self._file_status)

    def close(self) -> None:
        """Close the file; what is still held is lost."""
        self._close_file()
