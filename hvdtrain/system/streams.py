"""Standard output and standard error whose write errors never end the program that prints.

A training must not end because nobody reads its output any more (`| head -1`, a closed terminal), or because the disk
under its log is full. What cannot be written is dropped and counted, and reported once the stream works again.
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
    """What could not be written to a stream."""

    total_bytes: int = 0  # bytes, ever
    unreported_bytes: int = 0  # bytes since the stream last worked
    last_error: str = ""  # why, the last time


class DroppingFile(io.RawIOBase):
    """A file descriptor, written to without errors: bytes that it does not take are dropped."""

    def __init__(self, descriptor: int) -> None:
        self.dropped = DroppedOutput()
        self._descriptor = descriptor

    def write(self, data: Any, /) -> int:
        """Write all of `data`, or drop the rest of it."""
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
        except BlockingIOError:  # another process of this terminal or pipe has made it non-blocking
            select.select([], [self._descriptor], [])
            return 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def make_dropping_stream(stream: TextIO | None, descriptor: int) -> TextIO:
    """A text stream like `stream`, or for a descriptor that was closed, that drops what it cannot write."""
    file = io.BufferedWriter(DroppingFile(descriptor))
    errors = stream.errors if stream is not None else None
    return io.TextIOWrapper(
        file,
        encoding=stream.encoding if stream is not None else "utf-8",
        # A character that the encoding lacks is not worth an error either.
        errors=errors if errors not in (None, "strict") else "backslashreplace",
        newline="\n",
        line_buffering=stream is None or bool(getattr(stream, "line_buffering", False)),
        write_through=bool(getattr(stream, "write_through", False)),
    )


def open_closed_descriptors() -> None:
    """Open /dev/null for those of the descriptors 0 to 2 that are closed: no other file may take their numbers."""
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
    """Let this process's own standard output and standard error drop what they cannot write, from now on.

    A stream that somebody has put in their place (a notebook, a test) is left alone.
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
    """`install` for the time of the block, which is part of another program."""
    before = {name: getattr(sys, name) for name in STREAM_NAMES}
    install_dropping_streams()
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def find_dropped_output() -> dict[str, DroppedOutput]:
    """By the stream's name, what could not be written so far; streams of others and those without a loss left out."""
    found = {}
    for name in STREAM_NAMES:
        stream = getattr(sys, name)
        file = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(file, DroppingFile):
            stream.flush()
            if file.dropped.total_bytes:
                found[name] = file.dropped
    return found
