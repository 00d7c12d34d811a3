"""Where the ranks of `hvdtrain doctor -H` come together: each connects to the doctor, and does what it is told."""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvdtrain.doctor.peer import Reply
from hvdtrain.errors import RunError

COME_SECONDS = 60.0
END_SECONDS = 10.0


class Meeting:
    """The ranks that have come."""

    def __init__(self, ranks: int) -> None:
        self.token = secrets.token_hex(16)
        self.server = socket.create_server(("", 0), backlog=ranks + 16)
        self.lines: dict[int, Any] = {}  # the connection of each rank, as a file to write to
        self.at: dict[int, tuple[str, int]] = {}  # where other ranks connect to it
        self.sockets: dict[int, socket.socket] = {}
        self.begun: dict[int, bytes] = {}  # of each rank's next answer, what has come
        self.commands = 0  # so many were given

    def welcome(self, ranks: int, launcher: subprocess.Popen[bytes]) -> list[int]:
        """Wait until all ranks have come; the ranks that have not, when the launcher has ended or it takes too long."""
        until = time.monotonic() + COME_SECONDS
        self.server.settimeout(0.2)
        while len(self.lines) < ranks and launcher.poll() is None and time.monotonic() < until:
            # Anybody may connect, and say anything.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self.take(self.server.accept()[0])
        return [rank for rank in range(ranks) if rank not in self.lines]

    def take(self, connection: socket.socket) -> None:
        """Let a rank in, if it is one."""
        connection.settimeout(5)
        lines = connection.makefile("rw")
        said = json.loads(lines.readline(10_000))
        if not secrets.compare_digest(str(said["token"]), self.token):
            connection.close()
            return
        self.lines[said["rank"]], self.at[said["rank"]] = lines, tuple(said["at"])
        self.sockets[said["rank"]] = connection

    def tell(self, commands: Mapping[int, Reply], seconds: float) -> dict[int, Reply]:
        """Give each of some ranks a command, and wait for their answers; {"error": ...} where there is none in time."""
        replies: dict[int, Reply] = {}
        self.commands += 1
        with selectors.DefaultSelector() as selector:
            for rank, command in commands.items():
                try:
                    self.lines[rank].write(json.dumps({**command, "number": self.commands}) + "\n")
                    self.lines[rank].flush()
                except OSError as error:
                    replies[rank] = {"error": f"lost: {error.strerror}"}
                    continue
                selector.register(self.sockets[rank], selectors.EVENT_READ, rank)
            until = time.monotonic() + seconds
            while selector.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    for reply in self.hear(key.data):
                        # One to an earlier command, which came too late, is none.
                        if reply.pop("number") == self.commands:
                            selector.unregister(key.fileobj)
                            replies[key.data] = reply
        return {rank: replies.get(rank, {"error": f"no answer within {seconds:g} s"}) for rank in commands}

    def hear(self, rank: int) -> list[Reply]:
        """The answers of a rank that are whole."""
        try:
            data = self.sockets[rank].recv(1 << 16)
            *lines, self.begun[rank] = (self.begun.get(rank, b"") + data).split(b"\n")
            return [json.loads(line) for line in lines] if data else [{"error": "it ended", "number": self.commands}]
        except (OSError, ValueError) as error:
            return [{"error": f"lost: {error}", "number": self.commands}]

    def close(self) -> None:
        """Send all ranks home."""
        for lines in self.lines.values():
            with contextlib.suppress(OSError):
                lines.write('{"do": "end"}\n')
                lines.flush()
        for rank, lines in self.lines.items():
            with contextlib.suppress(OSError):
                lines.close()
            self.sockets[rank].close()
        self.server.close()


@contextlib.contextmanager
def meeting(hosts: Sequence[str], address: str, options: Sequence[str]) -> Iterator[Meeting]:
    """A rank on each host, started by `hvdtrain doctor OPTIONS`, that has come; rank i is on host i.

    address: this host's, which they can reach.
    Raises RunError with the launcher's own words if they do not all come.
    """
    with tempfile.TemporaryFile() as said, contextlib.ExitStack() as undo:
        room = Meeting(len(hosts))
        where = f"{address}:{room.server.getsockname()[1]}:{room.token}"
        command = [sys.executable, "-m", "hvdtrain", "doctor", "--meet", where, *options]
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
        undo.callback(end, launcher)
        undo.callback(room.close)
        absent = room.welcome(len(hosts), launcher)
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
