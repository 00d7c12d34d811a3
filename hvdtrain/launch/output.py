"""What launchers print, parsed: the rank and stream that a line is from, its text, messages in it, and ranks' ends."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hvdtrain.launch.rank_output import BYTE_MARKS
from hvdtrain.system.messages import RankMessage, RankProgress, parse_message

# horovodrun: "[0]<stdout>:text". Open MPI 5: "[1,0]<stdout>: text", where 1 is the job.
HOROVOD_LABEL = re.compile(rb"\[(?:(?P<job>[^\]\s]*),)?(?P<rank>\d+)\]<(?P<stream>stdout|stderr|stddiag)>:")
LINE_END = re.compile(rb"[\r\n]")
LINE_FEED = re.compile(rb"\n")
# The label of each line, as `OutputParser.convert_plain_lines` replaces it; and what has to be looked at line by line.
PLAIN_LABEL_TEMPLATE = rb"^\[(?:(?P<job>[^\]\s]*),)?(?P<rank>\d+)\]<%b>:(?(job) ?)"
PLAIN_LABELS = {
    stream: re.compile(PLAIN_LABEL_TEMPLATE % stream.encode(), re.MULTILINE) for stream in ("stdout", "stderr")
}
SHELL_END_TEXT = "Terminated"  # printed by the shell around a rank that its launcher ends with SIGTERM
SPECIAL_MARKS = (b"##hvdtrain ", b"Peer host:", f"{SHELL_END_TEXT}\n".encode(), *BYTE_MARKS)


@dataclass(frozen=True)
class OutputFormat:
    """How a launcher labels the lines of its ranks, and what it prints itself when a rank or a host is lost.

    Attributes:
        label: matches at the beginning of a rank's line. Its group `rank` is the rank's number; a group `stream`, if it
            has one, tells standard output from standard error in a launcher that mixes the two; after a group `job`
            that matched, one blank belongs to the label.
        piece_bytes: the launcher breaks longer lines into labelled pieces of so many bytes, and only at a line feed
            begins a new one; None if it leaves lines whole, and labels what follows a carriage return, too.
        rank_exits: match what the launcher prints of a rank that ended, in text whose white space is single blanks. The
            group `rank` is the rank's number; one of `code` (exit code), `signal` (number) and `description` (the
            system's words for the signal) says how it ended; with none of them the exit code was 0.
        lost_hosts: match what the launcher prints of a host that it lost; the group `host` is the host's name.
    """

    label: re.Pattern[bytes] = HOROVOD_LABEL
    piece_bytes: int | None = None
    rank_exits: tuple[re.Pattern[str], ...] = ()
    lost_hosts: tuple[re.Pattern[str], ...] = ()


DEFAULT_FORMAT = OutputFormat()


class OutputLine(NamedTuple):
    """A line of output; rank is None if it is the launcher's own."""

    rank: int | None
    stream: str  # "stdout" or "stderr"
    text: str


class OutputParser:
    """Takes the bytes of one of the launcher's streams and gives back lines, each as soon as it is complete.

    A carriage return ends a line too, so that a rank's own progress bar comes through as it moves.
    """

    def __init__(self, stream: str, output_format: OutputFormat = DEFAULT_FORMAT) -> None:
        """Parse one of the launcher's streams: "stdout" or "stderr"."""
        self.stream = stream
        self.format = output_format
        self.line_end = LINE_END if output_format.piece_bytes is None else LINE_FEED
        self.buffer = bytearray()
        self.searched = 0  # bytes at the beginning of the buffer that are known to hold no line end
        self.owner: tuple[int | None, str] = (None, stream)  # of text that continues after a carriage return
        self.pieces: dict[int, bytes] = {}  # of each rank's line that the launcher broke
        self.ended_by_return: set[tuple[int | None, str]] = set()  # whose last line ended with a carriage return

    def parse_bytes(self, data: bytes) -> Iterator[OutputLine]:
        """Yield the lines that `data` completes; without data, also the last, unfinished one."""
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
        """Convert the lines that `data` completes in one piece, `[rank] text` each, if that makes no difference.

        A rank that prints much must not wait for this process to look at each line. It makes a difference if a line is
        a message or one of the launcher's own, ends with a carriage return, or is not UTF-8.

        Returns:
            The text of these lines, or ""; the rest of the data, for `parse_bytes`.
        """
        whole = bytes(self.buffer) + data
        head = whole[: whole.rfind(b"\n") + 1]
        is_special = self.format.label is not HOROVOD_LABEL or self.ended_by_return or self.owner != (None, self.stream)
        if is_special or b"\r" in head or any(mark in head for mark in SPECIAL_MARKS):
            return "", data
        text, count = PLAIN_LABELS[self.stream].subn(rb"[\g<rank>] ", head)
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
        """Yield the line in `raw`, unless it is only half of a two-byte line end."""
        label = self.format.label.match(raw)
        if label:
            part = label.groupdict()
            raw = raw[label.end() :]
            if part.get("job") is not None:
                raw = raw.removeprefix(b" ")
            stream = part.get("stream") or self.stream.encode()
            self.owner = (int(part["rank"]), "stdout" if stream == b"stdout" else "stderr")
            if self.format.piece_bytes is not None:
                whole = self.pieces.pop(self.owner[0], b"") + raw
                if len(raw) == self.format.piece_bytes:
                    self.pieces[self.owner[0]] = whole
                    return
                raw = whole
        if self.format.piece_bytes is not None:
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


def extract_message(line: OutputLine, mark: str, *, elastic: bool = False) -> RankMessage | None:
    """Return the message in a line, or None; `mark` begins the messages of this run.

    Its rank is that of the launcher's label. In an elastic run the label is the number of the slot when it was filled,
    and the message itself has the rank in this generation.
    """
    message = parse_message(line.text, mark) if line.stream == "stdout" else None
    if message is None or isinstance(message, RankProgress) or line.rank is None or elastic:
        return message
    return replace(message, rank=line.rank)


class RankExit(NamedTuple):
    """How a rank ended by the launcher's words. A code above 128 is 128 + a signal's number."""

    rank: int
    code: int


# The system's words for each signal.
SIGNALS_BY_DESCRIPTION = {
    str(signal.strsignal(number)): number for number in signal.valid_signals() if signal.strsignal(number)
}
SIGNAL_DESCRIPTIONS = "|".join(map(re.escape, SIGNALS_BY_DESCRIPTION))  # for patterns
PEER_HOST_PATTERN = re.compile(r"\s+Peer host:\s+(\S+)\s*\Z")  # printed by Open MPI in a rank that lost another one


def find_rank_exits(lines: Sequence[str], output_format: OutputFormat) -> list[RankExit]:
    """Return the ranks that ended badly by the launcher's own lines, in the order of these."""
    text = " ".join(" ".join(lines).split())
    matches = [match for pattern in output_format.rank_exits for match in pattern.finditer(text)]
    return [parse_rank_exit(match) for match in sorted(matches, key=re.Match.start)]


def parse_rank_exit(match: re.Match[str]) -> RankExit:
    """Return the rank and the code in a match of one of `OutputFormat.rank_exits`."""
    part = match.groupdict()
    number = SIGNALS_BY_DESCRIPTION[part["description"]] if part.get("description") else int(part.get("signal") or 0)
    return RankExit(int(part["rank"]), 128 + number if number else int(part.get("code") or 0))


def find_lost_host(lines: Sequence[str], output_format: OutputFormat) -> str | None:
    """Return the first host that the launcher reports as lost, or None; a launcher may end with code 0 then."""
    text = " ".join(" ".join(lines).split())
    matches = [match for pattern in output_format.lost_hosts if (match := pattern.search(text))]
    return min(matches, key=re.Match.start)["host"] if matches else None
