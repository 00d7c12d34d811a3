"""The lines of a text file as a map-style dataset, by an index of their offsets that is made once."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hvdtrain.system.errors import UserError

# The index: this header, then int64 offsets of the lines' beginnings, and of the end of the file. The file is as long
# as its header says, so that an index that was not written to its end is made again.
HEADER = struct.Struct("<8sqqq")  # magic, size and mtime (ns) of the text, number of lines
MAGIC = b"hvdlines"
BLOCK_BYTES = 16 << 20  # of the text, read at a time


class Lines:
    """Line i of a text file, without its end of line, as str: a dataset with len() and [i].

        def dataset(self, split):
            return Lines(self.folder / f"{split}.jsonl")

    The first process that opens a file writes an index of where its lines begin, 8 bytes a line, to `.NAME.lines` next
    to it, or, if that cannot be written, to `$XDG_CACHE_HOME/hvdtrain/lines/`. The index is made again when the
    file's size or time of change differs. Text and index are mapped into memory, not read: processes share them, and an
    object can be pickled. A last line may lack its end of line; empty lines count.
    """

    def __init__(self, path: str | os.PathLike[str], encoding: str = "utf-8") -> None:
        """Open the index, and make it if there is none.

        Args:
            path: of the file.
            encoding: of its text, in which a byte 10 must always be an end of line: utf-8, latin-1, ...

        Raises:
            UserError: the file cannot be read, or no index can be written.
        """
        self.path, self.encoding = Path(path).absolute(), encoding
        try:
            self._status = _read_status(self.path)
            self._open()
        except OSError as error:
            raise UserError(f"Lines({str(path)!r}): {error.filename or path}: {error.strerror or error}") from error

    def _open(self) -> None:
        self._offsets = _open_index(self.path, *self._status)
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self._status:
                raise UserError(f"{self.path} has changed since its dataset was made: start again")
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> str:
        """Return line i; negative numbers count from the end. Raises IndexError, and UnicodeDecodeError by its line."""
        count = len(self)
        if not -count <= i < count:
            raise IndexError(f"line {i} of {count}")
        i %= count
        begin, end = int(self._offsets[i]), int(self._offsets[i + 1])
        return self._text[begin:end].removesuffix(b"\n").removesuffix(b"\r").decode(self.encoding)

    def __getstate__(self) -> dict[str, object]:
        """Return what another process opens the file by."""
        return {"path": self.path, "encoding": self.encoding, "_status": self._status}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()


def _read_status(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open_index(path: Path, size: int, mtime: int) -> NDArray[np.int64]:
    """Return the offsets, (lines + 1,) int64, of an index that is there, or else of one that is made now."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{path.name[:100]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.lines"
    places = [path.with_name(f".{path.name}.lines"), root / "hvdtrain" / "lines" / name]
    for place in places:
        if (offsets := _map_index(place, size, mtime)) is not None:
            return offsets
    problem: OSError | None = None
    for place in places:
        try:
            if place is not places[0]:
                place.parent.mkdir(parents=True, exist_ok=True)
            _write_index(path, place, size, mtime)
        except OSError as error:
            problem = problem or error
            continue
        offsets = _map_index(place, size, mtime)
        if offsets is not None:
            return offsets
    raise problem or OSError(f"{places[0]} was replaced while it was made")


def _map_index(place: Path, size: int, mtime: int) -> NDArray[np.int64] | None:
    """Return the offsets that an index has; None if it is not of this text, or not there."""
    try:
        with place.open("rb") as file:
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                return None
            magic, of_size, of_mtime, count = HEADER.unpack(header)
            expected = HEADER.size + 8 * (count + 1)
            if (magic, of_size, of_mtime) != (MAGIC, size, mtime) or os.fstat(file.fileno()).st_size != expected:
                return None
            return np.memmap(file, "<i8", "r", HEADER.size, (count + 1,))
    except OSError:
        return None


def _write_index(path: Path, place: Path, size: int, mtime: int) -> None:
    """Write the index of a text to a temporary file, and move that into its place.

    Raises:
        OSError: it cannot be written.
        UserError: the text changes meanwhile.
    """
    temporary = place.with_name(f"{place.name}.{os.getpid()}.new")
    try:
        with path.open("rb") as text, temporary.open("wb") as index:
            index.write(HEADER.pack(MAGIC, size, mtime, 0))
            count = _write_offsets(text, index)
            if _read_status(path) != (size, mtime):
                raise UserError(f"{path} changes while its lines are counted: start again")
            index.seek(0)
            index.write(HEADER.pack(MAGIC, size, mtime, count))
            index.flush()
            os.fsync(index.fileno())
        temporary.replace(place)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_offsets(text: BinaryIO, index: BinaryIO) -> int:
    """Write the offset of each line of a text and of its end; return the number of lines."""
    count, end, last = 0, 0, b"\n"
    while block := text.read(BLOCK_BYTES):
        if last == b"\n":
            index.write(np.array([end], "<i8").tobytes())
            count += 1
        begins = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
        last, inside = block[-1:], begins[begins < len(block)]
        index.write((inside + end).astype("<i8").tobytes())
        count, end = count + len(inside), end + len(block)
    index.write(np.array([end], "<i8").tobytes())
    return count
