"""Where the ranks of `hvdtrain doctor -H` come together: each connects to the doctor, and does what it is told."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.doctor.lines import MAX_FIRST_LINE_BYTES, MAX_LINE_BYTES, SignedLines, accept_session
from hvdtrain.doctor.peer import WorkerMessage
from hvdtrain.system import signed_http
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import TO_STDOUT, Child, Deadline, ProcessTimeout
from hvdtrain.system.signed_http import MOST_STRANGERS, SECRET, STRANGER_SECONDS

EXTRA_BACKLOG = 4096  # connections that wait to be taken


@dataclass
class PendingConnection:
    """A connection that has not shown that it is a rank."""

    connection: socket.socket
    nonce: str
    accepted_at: float  # by the monotonic clock
    received: bytes = b""


@dataclass
class WorkerConnection:
    """A rank that has come."""

    connection: socket.socket
    lines: SignedLines
    listen_address: tuple[str, int]  # where other ranks connect to it
    received: bytes = b""  # of its next answer, what has come


class Coordinator:
    """The ranks that have come. Who does not know `secret` is not let in, and keeps nobody out."""

    def __init__(self, size: int, address: str, limits: DoctorLimits | None = None) -> None:
        """Listen for the ranks.

        Args:
            size: how many come.
            address: this host's, which the ranks can reach.
            limits: how long to wait for them.
        """
        self.limits = limits or DoctorLimits()
        self.secret = signed_http.new_secret()
        self.size = size
        self.listener = socket.create_server((address, 0), backlog=size + EXTRA_BACKLOG)
        self.listener.setblocking(False)
        self.workers: dict[int, WorkerConnection] = {}
        self.command_number = 0  # so many were given

    def accept_workers(self, launcher: Child) -> list[int]:
        """Wait until all ranks have come; the ranks that have not, when the launcher has ended or it takes too long."""
        deadline = Deadline(self.limits.worker_join)
        strangers: list[PendingConnection] = []  # the first that came first
        while len(self.workers) < self.size and launcher.exit_code() is None and not deadline.expired:
            with selectors.DefaultSelector() as selector:
                selector.register(self.listener, selectors.EVENT_READ)
                for stranger in strangers:
                    selector.register(stranger.connection, selectors.EVENT_READ, stranger)
                ready = [key.data for key, _ in selector.select(0.2)]
            left = [one for one in ready if one is not None and not self.read_first_line(one)]
            left += [one for one in strangers if time.monotonic() - one.accepted_at > STRANGER_SECONDS]
            left += strangers[:-MOST_STRANGERS]
            for stranger in left:
                self.close_unless_worker(stranger)
            strangers = [one for one in strangers if one not in left]
            if None in ready:
                strangers += self.accept_connections()
        for stranger in strangers:
            self.close_unless_worker(stranger)
        return [rank for rank in range(self.size) if rank not in self.workers]

    def accept_connections(self) -> list[PendingConnection]:
        """Take the connections that wait, and challenge them."""
        strangers: list[PendingConnection] = []
        with contextlib.suppress(OSError):
            while len(strangers) < MOST_STRANGERS:
                strangers.append(
                    PendingConnection(self.listener.accept()[0], signed_http.new_secret(), time.monotonic())
                )
        for stranger in strangers:
            stranger.connection.setblocking(False)
            with contextlib.suppress(OSError):
                stranger.connection.send(f"{stranger.nonce}\n".encode())
        return strangers

    def read_first_line(self, stranger: PendingConnection) -> bool:
        """Take in what a connection says, and let it in if it is a rank; False if it has nothing more to say."""
        try:
            data = stranger.connection.recv(MAX_FIRST_LINE_BYTES)
            stranger.received += data
            if not data or len(stranger.received) > MAX_FIRST_LINE_BYTES or b"\n" not in stranger.received:
                return bool(data) and len(stranger.received) <= MAX_FIRST_LINE_BYTES
            line, _, rest = stranger.received.partition(b"\n")
            lines, said = accept_session(signed_http.read_key({SECRET: self.secret}), stranger.nonce, line)
            rank, (address, port) = int(said["rank"]), said["at"]
            if 0 <= rank < self.size and rank not in self.workers:
                self.workers[rank] = WorkerConnection(stranger.connection, lines, (str(address), int(port)), rest)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return False

    def close_unless_worker(self, stranger: PendingConnection) -> None:
        """Close a connection, unless it is a rank's by now."""
        if all(attendee.connection is not stranger.connection for attendee in self.workers.values()):
            stranger.connection.close()

    def run_commands(self, commands: Mapping[int, WorkerMessage], seconds: float) -> dict[int, WorkerMessage]:
        """Give each of some ranks a command, and wait for their answers; {"error": ...} where there is none in time."""
        replies: dict[int, WorkerMessage] = {}
        self.command_number += 1
        with selectors.DefaultSelector() as selector:
            for rank, command in commands.items():
                attendee = self.workers[rank]
                try:
                    attendee.connection.settimeout(self.limits.command_send)
                    attendee.connection.sendall(attendee.lines.sign_line({**command, "number": self.command_number}))
                except OSError as error:
                    replies[rank] = {"error": f"lost: {error.strerror or error}"}
                    continue
                selector.register(attendee.connection, selectors.EVENT_READ, rank)
            deadline = Deadline(seconds)
            while selector.get_map() and (left := deadline.left()) > 0:
                for key, _ in selector.select(left):
                    for reply in self.read_replies(self.workers[key.data]):
                        # One to an earlier command, which came too late, is none.
                        if reply.pop("number") == self.command_number and key.data not in replies:
                            selector.unregister(key.fileobj)
                            replies[key.data] = reply
        return {rank: replies.get(rank, {"error": f"no answer within {seconds:g} s"}) for rank in commands}

    def read_replies(self, attendee: WorkerConnection) -> list[WorkerMessage]:
        """The answers of a rank that are whole."""
        try:
            data = attendee.connection.recv(1 << 16)
            *lines, attendee.received = (attendee.received + data).split(b"\n")
            if len(attendee.received) > MAX_LINE_BYTES:
                raise ValueError(f"an answer of more than {MAX_LINE_BYTES} bytes")
            replies = [dict(attendee.lines.verify_line(line)) for line in lines]
            return replies if data else [{"error": "it ended", "number": self.command_number}]
        except (OSError, ValueError, TypeError) as error:
            return [{"error": f"lost: {error}", "number": self.command_number}]

    def close(self) -> None:
        """Send all ranks home."""
        for attendee in self.workers.values():
            with contextlib.suppress(OSError):
                attendee.connection.sendall(attendee.lines.sign_line({"do": "end"}))
            attendee.connection.close()
        self.listener.close()


@contextlib.contextmanager
def start_coordinator(hosts: Sequence[str], address: str, options: Sequence[str]) -> Iterator[Coordinator]:
    """A rank on each host, started by `hvdtrain doctor OPTIONS`, that has come; rank i is on host i.

    address: this host's, which they can reach.
    Raises RunError with the launcher's own words if they do not all come.
    """
    with tempfile.TemporaryFile() as said, contextlib.ExitStack() as undo:
        room = Coordinator(len(hosts), address)
        where = f"{address}:{room.listener.getsockname()[1]}"
        command = [sys.executable, "-m", "hvdtrain", "doctor", "--meet", where, *options]
        environ = {**os.environ, SECRET: room.secret}  # which the launcher hands on to its ranks
        launcher = Child(command, env=environ, stdout=said, stderr=TO_STDOUT, new_session=False)
        undo.callback(stop_launcher, launcher)
        undo.callback(room.close)
        absent = room.accept_workers(launcher)
        if absent:
            said.seek(0)
            words = said.read().decode(errors="replace")
            names = ", ".join(hosts[rank] for rank in absent)
            raise RunError(f"no rank came from {names}: {extract_launch_error(words) or 'the launcher says nothing'}")
        yield room


def extract_launch_error(words: str) -> str:
    """What a launch says of its failure."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("hvdtrain: error: ")]
    return (errors or lines or [""])[-1][:500]


def stop_launcher(launcher: Child) -> None:
    """Wait for the launcher, whose ranks go home; end it and them if it takes long."""
    # The first signal may only ask for a graceful stop.
    again = (signal.SIGTERM, DoctorLimits.launcher_terminate)
    for number, seconds in ((None, DoctorLimits.launcher_exit), again, again):
        if number is not None:
            launcher.send_signal(number)
        with contextlib.suppress(ProcessTimeout):
            launcher.wait_for_exit(Deadline(seconds))
            return
    launcher.kill_group()
