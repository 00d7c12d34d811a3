"""Standard output and standard error whose write errors never end the program that prints.

A training must not end because its output is no longer read (`| head -1`, a closed terminal), or because the disk that
holds its log is full. What cannot be written is dropped and counted, and reported once the stream works again.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

STREAM_NAMES = ("stdout", "stderr")


@dataclass
class DroppedOutput:
    """What could not be written to a stream.

    Attributes:
        total_bytes: all that was dropped.
        unreported_bytes: what was dropped since the stream last worked.
        last_error: why, the last time.
    """

    total_bytes: int = 0
    unreported_bytes: int = 0
    last_error: str = ""


class DroppingFile(io.RawIOBase):
    """A file whose write errors are not raised: bytes that its descriptor does not accept are dropped."""

    def __init__(self, descriptor: int) -> None:
        self.dropped = DroppedOutput()
        self._descriptor = descriptor

    def write(self, data: Any, /) -> int:
        """Write all of `data`, or drop the rest of it; return its length in either case."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            if self.dropped.unreported_bytes:
                lost = self.dropped.unreported_bytes
                line = f"\nhvdtrain: {lost} bytes of output could not be written: {self.dropped.last_error}\n"
                self._write_all(memoryview(line.encode()))
                self.dropped.unreported_bytes = 0
            while written < len(view):
                written += self._write_some(view[written:])
        except OSError as error:
            self.dropped.total_bytes += len(view) - written
            self.dropped.unreported_bytes += len(view) - written
            self.dropped.last_error = error.strerror or str(error)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[self._write_some(view) :]

    def _write_some(self, view: memoryview) -> int:
        try:
            return os.write(self._descriptor, view)
        except BlockingIOError:  # another process that shares the terminal or pipe has made it non-blocking
            select.select([], [self._descriptor], [])
            return 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def make_dropping_stream(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a text stream like `stream` that drops what it cannot write; None stands for a closed descriptor."""
    file = io.BufferedWriter(DroppingFile(descriptor))
    errors = stream.errors if stream is not None else None
    # A stream that PYTHONUNBUFFERED makes write-through, as images of containers often do, is not line-buffered.
    by_line = stream is None or any(getattr(stream, name, False) for name in ("line_buffering", "write_through"))
    return io.TextIOWrapper(
        file,
        encoding=stream.encoding if stream is not None else "utf-8",
        # A character that the encoding does not have must not raise either.
        errors=errors if errors not in (None, "strict") else "backslashreplace",
        newline="\n",
        line_buffering=by_line,
        write_through=bool(getattr(stream, "write_through", False)),
    )


def open_closed_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0 to 2 that is closed, so that no other file gets its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)


def install_dropping_streams() -> None:
    """Make this process's own standard output and standard error drop what they cannot write, from now on.

    A stream that was put in their place (by a notebook, a test) is left alone.
    """
    open_closed_descriptors()
    for descriptor, name in enumerate(STREAM_NAMES, start=1):
        stream: TextIO | None = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.flush()
            setattr(sys, name, make_dropping_stream(stream, descriptor))


@contextlib.contextmanager
def dropping_streams() -> Iterator[None]:
    """Install dropping streams for the duration of a block, in a program that is not hvdtrain's own."""
    before = {name: getattr(sys, name) for name in STREAM_NAMES}
    install_dropping_streams()
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def find_dropped_output() -> dict[str, DroppedOutput]:
    """Return, by the stream's name, what could not be written so far; only for dropping streams that dropped bytes."""
    found = {}
    for name in STREAM_NAMES:
        stream = getattr(sys, name)
        file = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(file, DroppingFile):
            stream.flush()
            if file.dropped.total_bytes:
                found[name] = file.dropped
    return found
