"""What the launchers print, taken apart: which rank and stream a line is from, its text, and messages in it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

from hvdtrain.system import messages

# horovodrun: "[0]<stdout>:text". Open MPI 5: "[1,0]<stdout>: text", where 1 is the job.
LINE_PREFIX = re.compile(rb"\[(?:(?P<job>[^\]\s]*),)?(?P<rank>\d+)\]<(?P<stream>stdout|stderr|stddiag)>:")
# srun: " 0: text", the number as wide as the largest one.
SRUN_PREFIX = re.compile(rb" *(?P<rank>\d+): ?")
SRUN_PIECE_BYTES = 1024  # bytes: srun breaks longer lines there, and shows each piece as a line
LINE_END = re.compile(rb"[\r\n]")
SRUN_LINE_END = re.compile(rb"\n")  # which is all that makes srun begin a new piece
# The prefix of each line of a rank, as `Lines.take_plain` replaces it; and what is looked at line by line.
PLAIN_PREFIX_TEMPLATE = rb"^\[(?:(?P<job>[^\]\s]*),)?(?P<rank>\d+)\]<%b>:(?(job) ?)"
PLAIN_PREFIXES = {
    stream: re.compile(PLAIN_PREFIX_TEMPLATE % stream.encode(), re.MULTILINE) for stream in ("stdout", "stderr")
}
SPECIAL_MARKS = (b"##hvdtrain ", b"Peer host:")


class OutputLine(NamedTuple):
    """A line of output; rank is None if it is the launcher's own."""

    rank: int | None
    stream: str  # "stdout" or "stderr"
    text: str


class OutputParser:
    """Takes the bytes of one of the launcher's streams and gives back lines, each as soon as it is complete.

    A carriage return ends a line too, so that a rank's own progress bar comes through as it moves.
    """

    def __init__(self, stream: str, prefix: re.Pattern[bytes] = LINE_PREFIX) -> None:
        self.stream = stream
        self.prefix = prefix
        self.line_end = SRUN_LINE_END if prefix is SRUN_PREFIX else LINE_END
        self.buffer = bytearray()
        self.searched = 0  # so much of the buffer has no line end
        self.owner: tuple[int | None, str] = (None, stream)  # of text that goes on after a carriage return
        self.pieces: dict[int, bytes] = {}  # of each rank's line that srun broke
        self.ended_by_return: set[tuple[int | None, str]] = set()  # whose last line ended with a carriage return

    def parse_bytes(self, data: bytes) -> Iterator[OutputLine]:
        """The lines that `data` completes; without data, also the last, unfinished one."""
        self.buffer += data
        start = 0
        while end := self.line_end.search(self.buffer, self.searched):
            yield from self.parse_output_line(bytes(self.buffer[start : end.start()]), end.group())
            start = self.searched = end.end()
        del self.buffer[:start]
        self.searched = len(self.buffer)
        if not data and self.buffer:
            yield from self.parse_output_line(bytes(self.buffer), b"\n")
            self.buffer.clear()
            self.searched = 0
        if not data:
            for rank, raw in self.pieces.items():
                yield OutputLine(rank, self.stream, raw.decode("utf-8", errors="replace"))
            self.pieces.clear()

    def convert_plain_lines(self, data: bytes) -> tuple[str, bytes]:
        """Take the lines that `data` completes in one piece, `[rank] text` each, if that makes no difference.

        A rank that prints much is not to wait for this process to look at each line. It makes a difference where a
        line is a message or one of the launcher's own, ends with a carriage return, or is not UTF-8.

        Returns:
            The text of these lines, or ""; what is left of the data, for `feed`.
        """
        whole = bytes(self.buffer) + data
        head = whole[: whole.rfind(b"\n") + 1]
        odd = self.prefix is not LINE_PREFIX or self.ended_by_return or self.owner != (None, self.stream)
        if odd or b"\r" in head or any(mark in head for mark in SPECIAL_MARKS):
            return "", data
        text, count = PLAIN_PREFIXES[self.stream].subn(rb"[\g<rank>] ", head)
        if count == 0 or count != head.count(b"\n"):
            return "", data
        try:
            plain = text.decode()
        except UnicodeDecodeError:
            return "", data
        self.buffer.clear()
        self.searched = 0
        return plain, whole[len(head) :]

    def parse_output_line(self, raw: bytes, end: bytes) -> Iterator[OutputLine]:
        """The line in `raw`, unless it is only half of a two-byte line end."""
        prefix = self.prefix.match(raw)
        if prefix:
            part = prefix.groupdict()
            raw = raw[prefix.end() :]
            if part.get("job") is not None:
                raw = raw.removeprefix(b" ")
            stream = part.get("stream", self.stream.encode())
            self.owner = (int(part["rank"]), "stdout" if stream == b"stdout" else "stderr")
            if self.prefix is SRUN_PREFIX:
                whole = self.pieces.pop(self.owner[0], b"") + raw
                if len(raw) == SRUN_PIECE_BYTES:
                    self.pieces[self.owner[0]] = whole
                    return
                raw = whole
        if self.prefix is SRUN_PREFIX:
            *returned, raw = raw.split(b"\r")
            for text in filter(None, returned):
                yield OutputLine(*self.owner, text.decode("utf-8", errors="replace"))
            if returned and not raw:
                return
        owner = self.owner
        half = not raw and (end == b"\r" or owner in self.ended_by_return)
        if end == b"\r":
            self.ended_by_return.add(owner)
        else:
            self.ended_by_return.discard(owner)
            self.owner = (None, self.stream)
        if not half:
            yield OutputLine(*owner, raw.decode("utf-8", errors="replace"))


def extract_message(line: OutputLine, mark: str, *, elastic: bool = False) -> dict[str, Any] | None:
    """The message in a line, if it is one: `mark` begins those of this run.

    The rank is that of the launcher's prefix. In an elastic run that is the number of the slot when it was filled, and
    the message has the rank of this generation.
    """
    parsed = messages.parse_message(line.text, mark) if line.stream == "stdout" else None
    message = messages.message_fields(parsed) if parsed is not None else None
    if message is not None and line.rank is not None and not elastic and "rank" in message:
        message["rank"] = line.rank
    return message


class RankExit(NamedTuple):
    """What the launcher says of a rank's end. A code above 128 is 128 + a signal's number."""

    rank: int
    code: int


# The system's words for each signal.
SIGNALS_BY_DESCRIPTION = {
    str(signal.strsignal(number)): number for number in signal.valid_signals() if signal.strsignal(number)
}
# Each in the launcher's own words, joined by single spaces.
RANK_EXIT_PATTERN = re.compile(
    r"\bProcess (?P<rank>\d+) exit with status code (?P<code>\d+)\."  # horovodrun
    r"|process rank (?P<rank2>\d+) with PID \d+ on node \S+ exited on signal (?P<signal>\d+)"  # Open MPI
    r"|due to process rank (?P<rank5>\d+) with PID \d+ on node \S+ exiting improperly"  # Open MPI, of code 0
    r"|Process name: \[[^\]]*,(?P<rank3>\d+)\] Exit code: (?P<code3>\d+)"  # Open MPI
    r"|srun: error: \S+: tasks? (?P<rank4>\d+)[-,\d]*: "
    rf"(?:Exited with exit code (?P<code4>\d+)|(?P<words>{'|'.join(map(re.escape, SIGNALS_BY_DESCRIPTION))}))"
)


def find_rank_exits(lines: list[str]) -> list[RankExit]:
    """The ranks that ended badly by the launcher's own lines, in their order."""
    found = []
    for match in RANK_EXIT_PATTERN.finditer(" ".join(" ".join(lines).split())):
        part = match.groupdict()
        rank = part["rank"] or part["rank2"] or part["rank3"] or part["rank4"] or part["rank5"]
        number = SIGNALS_BY_DESCRIPTION[part["words"]] if part["words"] else int(part["signal"] or 0)
        code = 128 + number if number else int(part["code"] or part["code3"] or part["code4"] or 0)
        found.append(RankExit(int(rank), code))
    return found


# Open MPI's launcher of a host, and a rank of the host that another rank is on.
LOST_HOST_PATTERN = re.compile(
    r"lost communication with a remote daemon\b.*? Remote daemon: \[\S+\] on node (\S+)"
    r"|daemon failed to report back after being spawned\..*? Remote host: (\S+)"  # said of one that had, too
)
PEER_HOST_PATTERN = re.compile(r"\s+Peer host:\s+(\S+)\s*\Z")


def find_lost_host(lines: list[str]) -> str | None:
    """The first host that Open MPI says it lost; it may end with code 0 then."""
    match = LOST_HOST_PATTERN.search(" ".join(" ".join(lines).split()))
    return match.group(match.lastindex or 0) if match else None
