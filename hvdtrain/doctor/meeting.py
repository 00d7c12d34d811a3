"""Where the ranks of `hvdtrain doctor -H` come together: each connects to the doctor, and does what it is told."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.doctor.lines import LONGEST, LONGEST_FIRST, SignedLines, welcome
from hvdtrain.doctor.peer import Reply
from hvdtrain.system import signed_http
from hvdtrain.system.errors import RunError
from hvdtrain.system.signed_http import MOST_STRANGERS, SECRET, STRANGER_SECONDS

COME_SECONDS = 60.0
END_SECONDS = 10.0
BACKLOG = 4096  # connections that wait to be taken
SEND_SECONDS = 5.0  # for a command to be taken


@dataclass
class Stranger:
    """A connection that has not shown that it is a rank."""

    connection: socket.socket
    nonce: str
    came: float  # by the monotonic clock
    said: bytes = b""


@dataclass
class Attendee:
    """A rank that has come."""

    connection: socket.socket
    lines: SignedLines
    at: tuple[str, int]  # where other ranks connect to it
    said: bytes = b""  # of its next answer, what has come


class Meeting:
    """The ranks that have come. Who does not know `secret` is not let in, and keeps nobody out."""

    def __init__(self, size: int, address: str) -> None:
        """address: this host's, which the ranks can reach."""
        self.secret = signed_http.new_secret()
        self.size = size
        self.server = socket.create_server((address, 0), backlog=size + BACKLOG)
        self.server.setblocking(False)
        self.ranks: dict[int, Attendee] = {}
        self.commands = 0  # so many were given

    def welcome(self, launcher: subprocess.Popen[bytes]) -> list[int]:
        """Wait until all ranks have come; the ranks that have not, when the launcher has ended or it takes too long."""
        until = time.monotonic() + COME_SECONDS
        strangers: list[Stranger] = []  # the first that came first
        while len(self.ranks) < self.size and launcher.poll() is None and time.monotonic() < until:
            with selectors.DefaultSelector() as selector:
                selector.register(self.server, selectors.EVENT_READ)
                for stranger in strangers:
                    selector.register(stranger.connection, selectors.EVENT_READ, stranger)
                ready = [key.data for key, _ in selector.select(0.2)]
            left = [one for one in ready if one is not None and not self.hear_stranger(one)]
            left += [one for one in strangers if time.monotonic() - one.came > STRANGER_SECONDS]
            left += strangers[:-MOST_STRANGERS]
            for stranger in left:
                self.dismiss(stranger)
            strangers = [one for one in strangers if one not in left]
            if None in ready:
                strangers += self.accept()
        for stranger in strangers:
            self.dismiss(stranger)
        return [rank for rank in range(self.size) if rank not in self.ranks]

    def accept(self) -> list[Stranger]:
        """Take the connections that wait, and challenge them."""
        strangers: list[Stranger] = []
        with contextlib.suppress(OSError):
            while len(strangers) < MOST_STRANGERS:
                strangers.append(Stranger(self.server.accept()[0], signed_http.new_secret(), time.monotonic()))
        for stranger in strangers:
            stranger.connection.setblocking(False)
            with contextlib.suppress(OSError):
                stranger.connection.send(f"{stranger.nonce}\n".encode())
        return strangers

    def hear_stranger(self, stranger: Stranger) -> bool:
        """Take in what a connection says, and let it in if it is a rank; False if it has nothing more to say."""
        try:
            data = stranger.connection.recv(LONGEST_FIRST)
            stranger.said += data
            if not data or len(stranger.said) > LONGEST_FIRST or b"\n" not in stranger.said:
                return bool(data) and len(stranger.said) <= LONGEST_FIRST
            line, _, rest = stranger.said.partition(b"\n")
            lines, said = welcome(signed_http.read_key({SECRET: self.secret}), stranger.nonce, line)
            rank, (address, port) = int(said["rank"]), said["at"]
            if 0 <= rank < self.size and rank not in self.ranks:
                self.ranks[rank] = Attendee(stranger.connection, lines, (str(address), int(port)), rest)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return False

    def dismiss(self, stranger: Stranger) -> None:
        """Close a connection, unless it is a rank's by now."""
        if all(attendee.connection is not stranger.connection for attendee in self.ranks.values()):
            stranger.connection.close()

    def tell(self, commands: Mapping[int, Reply], seconds: float) -> dict[int, Reply]:
        """Give each of some ranks a command, and wait for their answers; {"error": ...} where there is none in time."""
        replies: dict[int, Reply] = {}
        self.commands += 1
        with selectors.DefaultSelector() as selector:
            for rank, command in commands.items():
                attendee = self.ranks[rank]
                try:
                    attendee.connection.settimeout(SEND_SECONDS)
                    attendee.connection.sendall(attendee.lines.write({**command, "number": self.commands}))
                except OSError as error:
                    replies[rank] = {"error": f"lost: {error.strerror or error}"}
                    continue
                selector.register(attendee.connection, selectors.EVENT_READ, rank)
            until = time.monotonic() + seconds
            while selector.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    for reply in self.hear(self.ranks[key.data]):
                        # One to an earlier command, which came too late, is none.
                        if reply.pop("number") == self.commands and key.data not in replies:
                            selector.unregister(key.fileobj)
                            replies[key.data] = reply
        return {rank: replies.get(rank, {"error": f"no answer within {seconds:g} s"}) for rank in commands}

    def hear(self, attendee: Attendee) -> list[Reply]:
        """The answers of a rank that are whole."""
        try:
            data = attendee.connection.recv(1 << 16)
            *lines, attendee.said = (attendee.said + data).split(b"\n")
            if len(attendee.said) > LONGEST:
                raise ValueError(f"an answer of more than {LONGEST} bytes")
            replies = [dict(attendee.lines.parse(line)) for line in lines]
            return replies if data else [{"error": "it ended", "number": self.commands}]
        except (OSError, ValueError, TypeError) as error:
            return [{"error": f"lost: {error}", "number": self.commands}]

    def close(self) -> None:
        """Send all ranks home."""
        for attendee in self.ranks.values():
            with contextlib.suppress(OSError):
                attendee.connection.sendall(attendee.lines.write({"do": "end"}))
            attendee.connection.close()
        self.server.close()


@contextlib.contextmanager
def meeting(hosts: Sequence[str], address: str, options: Sequence[str]) -> Iterator[Meeting]:
    """A rank on each host, started by `hvdtrain doctor OPTIONS`, that has come; rank i is on host i.

    address: this host's, which they can reach.
    Raises RunError with the launcher's own words if they do not all come.
    """
    with tempfile.TemporaryFile() as said, contextlib.ExitStack() as undo:
        room = Meeting(len(hosts), address)
        where = f"{address}:{room.server.getsockname()[1]}"
        command = [sys.executable, "-m", "hvdtrain", "doctor", "--meet", where, *options]
        environ = {**os.environ, SECRET: room.secret}  # which the launcher hands on to its ranks
        launcher = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
        undo.callback(end, launcher)
        undo.callback(room.close)
        absent = room.welcome(launcher)
        if absent:
            said.seek(0)
            words = said.read().decode(errors="replace")
            names = ", ".join(hosts[rank] for rank in absent)
            raise RunError(f"no rank came from {names}: {last_line(words) or 'the launcher says nothing'}")
        yield room


def last_line(words: str) -> str:
    """What a launch says of its failure."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("hvdtrain: error: ")]
    return (errors or lines or [""])[-1][:500]


def end(launcher: subprocess.Popen[bytes]) -> None:
    """Wait for the launcher, whose ranks go home; end it and them if it takes long."""
    # The first signal may only ask for a graceful stop.
    for number in (None, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            launcher.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(END_SECONDS if number != signal.SIGTERM else 2)
            return
