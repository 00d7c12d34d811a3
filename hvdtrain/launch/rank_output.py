"""What a program's streams need on their way to `hvdtrain launch`: a traceback held back, bytes that are not UTF-8."""

from __future__ import annotations

import codecs
import re
import time

from hvdtrain.system.limits import ProgramLimits

DEFAULT_LIMITS = ProgramLimits()
TRACEBACK = b"Traceback (most recent call last):"
# torch puts its rank before each line of a traceback; an exception group is indented.
TRACEBACK_START = re.compile(rb"^(?:\[rank\d+\]: ?)?(?:  \+ Exception Group )?" + re.escape(TRACEBACK), re.MULTILINE)
RANK_LABEL = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
# The line that ends a traceback: the error's class, without indentation or, in a group, after its bar.
ERROR_LINE = re.compile(r"(?:  \| )?([A-Za-z_][\w.]*(?:: .*)?)")
HELD_BYTES = 64 << 10  # of a traceback and what follows it; longer ones are shown as they come
PAUSE_SECONDS = 0.5  # between a traceback and what a program prints that has not ended by it
TAIL_BYTES = 8 << 10  # of standard error, in which the reason of an abort is looked for

# Launchers read their ranks' output as UTF-8. A byte 0x80 to 0xFF that is not travels as a character that nobody uses,
# of the last private plane, and `hvdtrain launch` writes it as the byte again.
BYTE_PLANE = 0x10FE00
BYTE_CHARACTERS = re.compile(f"[{chr(BYTE_PLANE + 0x80)}-{chr(BYTE_PLANE + 0xFF)}]")
BYTE_MARKS = (b"\xf4\x8f\xba", b"\xf4\x8f\xbb")  # with which these characters begin in UTF-8
CARRIED_BYTES = "hvdtrain.carried_bytes"  # name of the error handler


def _carry_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(BYTE_PLANE + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(CARRIED_BYTES, _carry_bytes)


class ByteCarrier:
    """Turns the bytes of a stream, piece by piece, into UTF-8 from which `restore_bytes` makes them again."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(CARRIED_BYTES)

    def convert(self, data: bytes, *, last: bool = False) -> bytes:
        """Return the UTF-8 of a piece; with `last`, also of a character that is incomplete."""
        return self._decoder.decode(data, last).encode()


def restore_bytes(text: str, encoding: str) -> bytes:
    """Return text as bytes of an encoding, with the bytes that a ByteCarrier has converted."""
    parts = BYTE_CHARACTERS.split(text)
    carried = [bytes([ord(one) - BYTE_PLANE]) for one in BYTE_CHARACTERS.findall(text)]
    encoded = [part.encode(encoding, "backslashreplace") for part in parts]
    return b"".join(part + byte for part, byte in zip(encoded, [*carried, b""], strict=True))


class TracebackHolder:
    """Holds back a traceback on standard error until it is known whether the program ends by it.

    What is before a traceback passes at once. A traceback, and all that follows it, is held for some seconds, fewer if
    the program prints more after a pause: if it has not ended by then, all passes as it is.

    Attributes:
        tail: the last bytes of the stream, held or not.
    """

    def __init__(self, limits: ProgramLimits = DEFAULT_LIMITS) -> None:
        self.tail = b""
        self._limits = limits
        self._held = b""  # begins with a traceback, or with what may become one
        self._due = 0.0  # monotonic time at which it is passed on
        self._last_added = 0.0
        self._at_line_start = True
        self._shown = ""  # the last traceback, if it has been passed on and nothing came after it

    def add(self, data: bytes) -> bytes:
        """Take bytes of the stream, and return those to pass on now."""
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        if self._held:
            self.note_output()
        else:
            self._due = time.monotonic() + self._limits.hold_traceback
        self._last_added = time.monotonic()
        whole = self._held + data
        start = self._find_start(whole)
        passed, self._held = whole[:start], whole[start:]
        if len(self._held) > HELD_BYTES:
            return passed + self.release()
        self._note_passed(passed)
        return passed

    def note_output(self) -> None:
        """Note that the program prints more, on any stream: after a pause, it is not about to end."""
        now = time.monotonic()
        if now - self._last_added > PAUSE_SECONDS:
            self._due = min(self._due, now + self._limits.hold_followed)

    def release(self) -> bytes:
        """Stop to hold anything; return what was held."""
        held, self._held = self._held, b""
        self._note_passed(held)
        if TRACEBACK_START.match(held):
            self._shown = held.decode(errors="replace")
        return held

    def release_due(self) -> bytes:
        """Return what has been held for long enough."""
        return self.release() if self._held and self.seconds_left() == 0 else b""

    def seconds_left(self) -> float | None:
        """Return how long what is held has to be held still; None if nothing is."""
        return max(0.0, self._due - time.monotonic()) if self._held else None

    def take_error(self) -> tuple[str, str]:
        """Return the error by which the program ended, in a line, and its traceback; "" each if it printed none.

        The traceback is "" if it was passed on before. What is held is taken out.
        """
        if TRACEBACK_START.match(self._held):
            text, self._held = RANK_LABEL.sub("", self._held.decode(errors="replace")), b""
            return find_error_line(text), text
        return find_error_line(RANK_LABEL.sub("", self._shown)), ""

    def _note_passed(self, passed: bytes) -> None:
        if passed:
            self._at_line_start = passed.endswith((b"\n", b"\r"))
            self._shown = ""

    def _find_start(self, whole: bytes) -> int:
        """Return where in the bytes a traceback, or what may become the first line of one, begins."""
        for match in TRACEBACK_START.finditer(whole):
            if match.start() > 0 or self._at_line_start:
                return match.start()
        last = max(whole.rfind(b"\n"), whole.rfind(b"\r")) + 1
        if (last > 0 or self._at_line_start) and may_begin_traceback(whole[last:]):
            return last
        return len(whole)


def may_begin_traceback(line: bytes) -> bool:
    """Return whether an unfinished line may become the first one of a traceback."""
    for label in (rb"\[rank\d+\]: ?", rb""):
        rest = re.sub(rb"^" + label, b"", line)
        if rest and any(first.startswith(rest) for first in (TRACEBACK, b"  + Exception Group " + TRACEBACK)):
            return True
    return bool(line) and re.fullmatch(rb"\[(?:r(?:a(?:n(?:k\d*(?:\](?::| |: )?)?)?)?)?)?", line) is not None


def find_error_line(text: str) -> str:
    """Return the line of the error in the last traceback of a text; "" if there is none."""
    start = text.rfind(TRACEBACK.decode())
    if start < 0:
        return ""
    for line in text[start:].splitlines()[1:]:
        if match := ERROR_LINE.fullmatch(line.rstrip()):
            return match[1]
    return ""


def find_error_before_abort(text: str, abort: re.Pattern[str]) -> str:
    """Return the error line of a traceback that is followed at once by a line with `abort`; "" if there is none.

    The exit handlers of JAX wait for the other ranks, and abort the program if these do not come.
    """
    error = find_error_line(text)
    following = text.rpartition(error)[2].strip() if error else ""
    return error if abort.search(following.partition("\n")[0]) else ""
