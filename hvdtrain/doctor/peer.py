"""What one rank of `hvdtrain doctor -H` does: as it is told by the doctor, a JSON line to a command and to an answer.

Links are measured by sockets of its own, before Horovod starts: where a link is cut, Horovod would only hang.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import socket
import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

from hvdtrain.doctor.lines import MAX_FIRST_LINE_BYTES, MAX_LINE_BYTES, join_session
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.network import interface_address
from hvdtrain.system.processes import Deadline
from hvdtrain.system.signed_http import MOST_STRANGERS

MAX_PINGS, MAX_PING_SECONDS = 30, 3.0  # whichever ends first
SKIPPED_FRACTION = (
    0.1  # of the time of sending: until the connection runs at full speed, and what waits on the way is full
)
CPU_MEASURE_SECONDS = 0.1  # of CPU time
CHUNK_BYTES = 1 << 18
LINGER_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: what is still to be sent is thrown away

WorkerMessage = dict[str, Any]


def run_worker(meeting: tuple[str, int], key: bytes, rank: int, nic: str | None) -> None:
    """Join the doctor's meeting and do as told until it is over.

    key: the secret of the meeting. Raises OSError if the doctor cannot be reached, is gone, or is not the doctor.
    """
    with socket.create_connection(meeting, DoctorLimits.coordinator_connect) as doctor:
        doctor.settimeout(None)
        own = interface_address(nic) if nic else doctor.getsockname()[0]
        with socket.create_server((own, 0), backlog=MOST_STRANGERS) as door, doctor.makefile("rb") as said:
            lines, before = join_session(key, said.readline(MAX_FIRST_LINE_BYTES))
            doctor.sendall(before + lines.sign_line({"rank": rank, "at": door.getsockname()}))
            while line := said.readline(MAX_LINE_BYTES):
                try:
                    command = lines.verify_line(line)
                except ValueError as error:
                    raise ConnectionError(f"the doctor sends {error}") from None
                if command["do"] == "end":
                    return
                number = command.pop("number")
                try:
                    reply = WORKER_COMMANDS[command.pop("do")](door, **command)
                except Exception as error:
                    reply = {"error": f"{type(error).__name__}: {error}"}
                doctor.sendall(lines.sign_line({**reply, "number": number}))
    raise ConnectionError("the doctor is gone")


def measure_cpu(_: socket.socket) -> WorkerMessage:
    """How many times longer a piece of work takes than the CPU works on it: 1 on a host with nothing else to do."""
    begin, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < CPU_MEASURE_SECONDS:
        sum(range(1000))
    return {"ratio": (time.perf_counter() - begin) / (time.process_time() - used)}


def probe_link(_: socket.socket, to: tuple[str, int], ticket: str, seconds: float) -> WorkerMessage:
    """Time round trips to another rank, and send to it for so many seconds; that one measures how fast it goes."""
    try:
        connection = socket.create_connection((to[0], to[1]), DoctorLimits.link_connect)
    except TimeoutError:
        return {"error": "no answer"}
    except OSError as error:
        return {"error": error.strerror or str(error)}
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(ticket.encode())
        trips: list[float] = []
        while len(trips) < MAX_PINGS and sum(trips) < MAX_PING_SECONDS:
            begin = time.perf_counter()
            connection.sendall(b"?")
            if not connection.recv(1):
                return {"error": "closed by the other side"}
            trips.append(time.perf_counter() - begin)
        connection.sendall(b".")
        data, deadline = bytes(CHUNK_BYTES), Deadline(seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ABORT)
        with contextlib.suppress(TimeoutError):
            while (left := deadline.left()) > 0:
                connection.settimeout(left)
                connection.send(data)
    return {"round trip": statistics.median(trips)}


def serve_probe(door: socket.socket, ticket: str) -> WorkerMessage:
    """Answer another rank's round trips, and measure how fast it sends, in bits per second."""
    connection = wait_for_ticket(door, ticket.encode(), DoctorLimits.link_connect + 0.5)
    if connection is None:
        return {"error": "nobody came"}
    with connection:
        connection.settimeout(DoctorLimits.link_connect)
        while (ping := connection.recv(1)) == b"?":
            connection.sendall(ping)
        buffer, total = bytearray(CHUNK_BYTES), 0
        come = [(time.perf_counter(), 0)]
        with contextlib.suppress(ConnectionResetError):
            while count := connection.recv_into(buffer):
                total += count
                come.append((time.perf_counter(), total))
    return {"rate": compute_rate(come)}


def wait_for_ticket(door: socket.socket, ticket: bytes, seconds: float) -> socket.socket | None:
    """The connection that begins with the ticket, or None if there is none in time; what others say does not matter."""
    door.setblocking(False)
    deadline = Deadline(seconds)
    said: dict[socket.socket, bytes] = {}  # what each connection has said
    found: socket.socket | None = None
    while found is None and (left := deadline.left()) > 0:
        ready = select.select([door, *said], [], [], left)[0]
        if door in ready:
            with contextlib.suppress(OSError):
                said[door.accept()[0]] = b""
        for connection in said.keys() & set(ready):
            data = b""
            with contextlib.suppress(OSError):
                data = connection.recv(len(ticket) - len(said[connection]))
            said[connection] += data
            if hmac.compare_digest(said[connection], ticket):
                found = connection
            if not data or len(said[connection]) == len(ticket):
                del said[connection]
                if connection is not found:
                    connection.close()
    for connection in said:
        connection.close()
    return found


def compute_rate(come: list[tuple[float, int]]) -> float:
    """Bits per second, from when how many bytes had come in all, without the beginning."""
    begin = come[0][0] + SKIPPED_FRACTION * (come[-1][0] - come[0][0])
    start = next(index for index, (when, _) in enumerate(come) if when >= begin)
    start = min(start, max(len(come) - 2, 0))
    seconds = come[-1][0] - come[start][0]
    return 8 * (come[-1][1] - come[start][1]) / seconds if seconds > 0 else 0.0


def run_all_reduces(_: socket.socket, pairs: list[tuple[int, int]]) -> WorkerMessage:
    """All-reduce over each pair of ranks, by Horovod."""
    from hvdtrain.bench.pairs import benchmark_pairs

    return {"reduced": benchmark_pairs([(one, other) for one, other in pairs])}


WORKER_COMMANDS: dict[str, Callable[..., WorkerMessage]] = {
    "burn": measure_cpu,
    "link": probe_link,
    "serve": serve_probe,
    "reduce": run_all_reduces,
}
