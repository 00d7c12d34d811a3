"""The coordinator of the network test: starts a worker on each host, sends commands and collects replies."""

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

from hvdtrain.doctor.network_test.messages import (
    Command,
    EndTest,
    Failure,
    Hello,
    Reply,
    encode_message,
    parse_reply,
)
from hvdtrain.doctor.network_test.signed_lines import (
    MAX_FIRST_LINE_BYTES,
    MAX_LINE_BYTES,
    SignedLines,
    accept_session,
)
from hvdtrain.system import signed_http
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import TO_STDOUT, Child, Deadline, ProcessTimeout
from hvdtrain.system.records import parse_record
from hvdtrain.system.signed_http import MOST_STRANGERS, SECRET, STRANGER_SECONDS

JOIN_POLL_INTERVAL = 0.2  # seconds, at which the coordinator looks whether the launcher still runs
EXTRA_BACKLOG = 4096  # connections that wait to be accepted
READ_SIZE = 1 << 16  # bytes


@dataclass
class PendingConnection:
    """A connection that has not proved to be a worker's."""

    connection: socket.socket
    nonce: str
    accepted_at: float  # by the monotonic clock
    received: bytes = b""


@dataclass
class WorkerConnection:
    """The connection of a worker.

    Attributes:
        lines: what signs and verifies the lines on it.
        listen_address: where other workers connect to this one.
        received: the beginning of its next reply.
    """

    connection: socket.socket
    lines: SignedLines
    listen_address: tuple[str, int]
    received: bytes = b""


class Coordinator:
    """The workers by rank. Connections of others, who do not know `secret`, are closed and delay nobody."""

    def __init__(self, size: int, address: str, limits: DoctorLimits | None = None) -> None:
        """Listen for workers.

        Args:
            size: how many there will be.
            address: this host's, which they can reach.
            limits: how long to wait for them.
        """
        self.limits = limits or DoctorLimits()
        self.secret = signed_http.new_secret()
        self.size = size
        self.listener = socket.create_server((address, 0), backlog=size + EXTRA_BACKLOG)
        self.listener.setblocking(False)
        self.workers: dict[int, WorkerConnection] = {}
        self.command_number = 0  # of the newest commands

    def accept_workers(self, launcher: Child) -> list[int]:
        """Wait until all workers have connected, their launcher has ended, or it takes too long.

        Returns:
            the ranks whose workers have not connected.
        """
        deadline = Deadline(self.limits.worker_join)
        pending: list[PendingConnection] = []  # the oldest first
        while len(self.workers) < self.size and launcher.exit_code() is None and not deadline.expired:
            with selectors.DefaultSelector() as selector:
                selector.register(self.listener, selectors.EVENT_READ)
                for one in pending:
                    selector.register(one.connection, selectors.EVENT_READ, one)
                ready = [key.data for key, _ in selector.select(JOIN_POLL_INTERVAL)]
            done = [one for one in ready if one is not None and not self.read_first_line(one)]
            done += [one for one in pending if time.monotonic() - one.accepted_at > STRANGER_SECONDS]
            done += pending[:-MOST_STRANGERS]
            for one in done:
                self.close_unless_worker(one)
            pending = [one for one in pending if one not in done]
            if None in ready:
                pending += self.accept_connections()
        for one in pending:
            self.close_unless_worker(one)
        return [rank for rank in range(self.size) if rank not in self.workers]

    def accept_connections(self) -> list[PendingConnection]:
        """Accept the connections that wait, and send each a nonce."""
        accepted: list[PendingConnection] = []
        with contextlib.suppress(OSError):
            while len(accepted) < MOST_STRANGERS:
                connection = self.listener.accept()[0]
                accepted.append(PendingConnection(connection, signed_http.new_secret(), time.monotonic()))
        for one in accepted:
            one.connection.setblocking(False)
            with contextlib.suppress(OSError):
                one.connection.send(f"{one.nonce}\n".encode())
        return accepted

    def read_first_line(self, pending: PendingConnection) -> bool:
        """Read from a connection, and add it to the workers if it is one's.

        Returns:
            whether its first line is not complete, so that more is to be read.
        """
        with contextlib.suppress(OSError, ValueError):
            data = pending.connection.recv(MAX_FIRST_LINE_BYTES)
            pending.received += data
            if not data or len(pending.received) > MAX_FIRST_LINE_BYTES:
                return False
            line, newline, rest = pending.received.partition(b"\n")
            if not newline:
                return True
            lines, value = accept_session(signed_http.read_key({SECRET: self.secret}), pending.nonce, line)
            hello: Hello = parse_record(value, Hello)
            if 0 <= hello.rank < self.size and hello.rank not in self.workers:
                self.workers[hello.rank] = WorkerConnection(pending.connection, lines, hello.address, rest)
        return False

    def close_unless_worker(self, pending: PendingConnection) -> None:
        """Close a connection unless it has become a worker's."""
        if all(worker.connection is not pending.connection for worker in self.workers.values()):
            pending.connection.close()

    def run_commands(self, commands: Mapping[int, Command], seconds: float) -> dict[int, Reply]:
        """Send commands and wait for the replies.

        Args:
            commands: by the rank of the worker.
            seconds: to wait at most.

        Returns:
            the replies by rank, a Failure for each that did not come.
        """
        replies: dict[int, Reply] = {}
        self.command_number += 1
        with selectors.DefaultSelector() as selector:
            for rank, command in commands.items():
                worker = self.workers[rank]
                try:
                    worker.connection.settimeout(self.limits.command_send)
                    worker.connection.sendall(worker.lines.sign_line(encode_message(self.command_number, command)))
                except OSError as error:
                    replies[rank] = Failure(f"lost: {error.strerror or error}")
                    continue
                selector.register(worker.connection, selectors.EVENT_READ, rank)
            deadline = Deadline(seconds)
            while selector.get_map() and (left := deadline.left()) > 0:
                for key, _ in selector.select(left):
                    for number, reply in self.read_replies(self.workers[key.data]):
                        # A late reply to an earlier command does not count.
                        if number == self.command_number and key.data not in replies:
                            selector.unregister(key.fileobj)
                            replies[key.data] = reply
        return {rank: replies.get(rank, Failure(f"no answer within {seconds:g} s")) for rank in commands}

    def read_replies(self, worker: WorkerConnection) -> list[tuple[int, Reply]]:
        """Return a worker's replies that are complete, with the numbers of their commands."""
        try:
            data = worker.connection.recv(READ_SIZE)
            *lines, worker.received = (worker.received + data).split(b"\n")
            if len(worker.received) > MAX_LINE_BYTES:
                raise ValueError(f"a reply of more than {MAX_LINE_BYTES} bytes")
            replies = [parse_reply(worker.lines.verify_line(line)) for line in lines]
            return replies if data else [(self.command_number, Failure("it ended"))]
        except (OSError, ValueError) as error:
            return [(self.command_number, Failure(f"lost: {error}"))]

    def end_test(self) -> None:
        """End all workers and stop listening."""
        for worker in self.workers.values():
            with contextlib.suppress(OSError):
                worker.connection.sendall(worker.lines.sign_line(encode_message(0, EndTest())))
            worker.connection.close()
        self.listener.close()


@contextlib.contextmanager
def start_workers(hosts: Sequence[str], address: str, options: Sequence[str]) -> Iterator[Coordinator]:
    """Start a worker on each host by `hvdtrain doctor OPTIONS`; the worker of rank i is on host i.

    Args:
        hosts: their names.
        address: this host's, which they can reach.
        options: how to start ranks on these hosts.

    Raises:
        RunError: not all workers connected; the message has the launcher's own error.
    """
    with tempfile.TemporaryFile() as output, contextlib.ExitStack() as undo:
        coordinator = Coordinator(len(hosts), address)
        meet = f"{address}:{coordinator.listener.getsockname()[1]}"
        command = [sys.executable, "-m", "hvdtrain", "doctor", "--meet", meet, *options]
        environ = {**os.environ, SECRET: coordinator.secret}  # the launcher forwards it to its ranks
        launcher = Child(command, env=environ, stdout=output, stderr=TO_STDOUT, new_session=False)
        undo.callback(stop_launcher, launcher)
        undo.callback(coordinator.end_test)
        missing = coordinator.accept_workers(launcher)
        if missing:
            output.seek(0)
            error = extract_launch_error(output.read().decode(errors="replace"))
            names = ", ".join(hosts[rank] for rank in missing)
            raise RunError(f"no worker connected from {names}: {error or 'the launcher printed nothing'}")
        yield coordinator


def extract_launch_error(output: str) -> str:
    """Return the error in a launch's output, its last line if there is none, or ""."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("hvdtrain: error: ")]
    return (errors or lines or [""])[-1][:500]


def stop_launcher(launcher: Child) -> None:
    """Wait for the launcher, whose ranks end by themselves; end it and them if it takes long."""
    # The first signal may only ask for a graceful stop.
    again = (signal.SIGTERM, DoctorLimits.launcher_terminate)
    for number, seconds in ((None, DoctorLimits.launcher_exit), again, again):
        if number is not None:
            launcher.send_signal(number)
        with contextlib.suppress(ProcessTimeout):
            launcher.wait_for_exit(Deadline(seconds))
            return
    launcher.kill_group()
