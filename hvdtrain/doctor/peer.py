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

from hvdtrain.doctor.lines import LONGEST, LONGEST_FIRST, join
from hvdtrain.system.network import address_of
from hvdtrain.system.signed_http import MOST_STRANGERS

CONNECT_SECONDS = 2.5
PINGS, PING_SECONDS = 30, 3.0  # whichever ends first
SKIPPED = 0.1  # of the time of sending: until the connection runs at full speed, and what waits on the way is full
BURN_SECONDS = 0.1  # of CPU time
CHUNK = 1 << 18
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: what is still to be sent is thrown away

Reply = dict[str, Any]


def attend(meeting: tuple[str, int], key: bytes, rank: int, nic: str | None) -> None:
    """Join the doctor's meeting and do as told until it is over.

    key: the secret of the meeting. Raises OSError if the doctor cannot be reached, is gone, or is not the doctor.
    """
    with socket.create_connection(meeting, 10) as doctor:
        doctor.settimeout(None)
        own = address_of(nic) if nic else doctor.getsockname()[0]
        with socket.create_server((own, 0), backlog=MOST_STRANGERS) as door, doctor.makefile("rb") as said:
            lines, before = join(key, said.readline(LONGEST_FIRST))
            doctor.sendall(before + lines.write({"rank": rank, "at": door.getsockname()}))
            while line := said.readline(LONGEST):
                try:
                    command = lines.parse(line)
                except ValueError as error:
                    raise ConnectionError(f"the doctor sends {error}") from None
                if command["do"] == "end":
                    return
                number = command.pop("number")
                try:
                    reply = COMMANDS[command.pop("do")](door, **command)
                except Exception as error:
                    reply = {"error": f"{type(error).__name__}: {error}"}
                doctor.sendall(lines.write({**reply, "number": number}))
    raise ConnectionError("the doctor is gone")


def burn(_: socket.socket) -> Reply:
    """How many times longer a piece of work takes than the CPU works on it: 1 on a host with nothing else to do."""
    begin, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < BURN_SECONDS:
        sum(range(1000))
    return {"ratio": (time.perf_counter() - begin) / (time.process_time() - used)}


def link(_: socket.socket, to: tuple[str, int], ticket: str, seconds: float) -> Reply:
    """Time round trips to another rank, and send to it for so many seconds; that one measures how fast it goes."""
    try:
        connection = socket.create_connection((to[0], to[1]), CONNECT_SECONDS)
    except TimeoutError:
        return {"error": "no answer"}
    except OSError as error:
        return {"error": error.strerror or str(error)}
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(ticket.encode())
        trips: list[float] = []
        while len(trips) < PINGS and sum(trips) < PING_SECONDS:
            begin = time.perf_counter()
            connection.sendall(b"?")
            if not connection.recv(1):
                return {"error": "closed by the other side"}
            trips.append(time.perf_counter() - begin)
        connection.sendall(b".")
        data, until = bytes(CHUNK), time.monotonic() + seconds
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        with contextlib.suppress(TimeoutError):
            while (left := until - time.monotonic()) > 0:
                connection.settimeout(left)
                connection.send(data)
    return {"round trip": statistics.median(trips)}


def serve(door: socket.socket, ticket: str) -> Reply:
    """Answer another rank's round trips, and measure how fast it sends, in bits per second."""
    connection = wait_for_ticket(door, ticket.encode(), CONNECT_SECONDS + 0.5)
    if connection is None:
        return {"error": "nobody came"}
    with connection:
        connection.settimeout(CONNECT_SECONDS)
        while (ping := connection.recv(1)) == b"?":
            connection.sendall(ping)
        buffer, total = bytearray(CHUNK), 0
        come = [(time.perf_counter(), 0)]
        with contextlib.suppress(ConnectionResetError):
            while count := connection.recv_into(buffer):
                total += count
                come.append((time.perf_counter(), total))
    return {"rate": rate(come)}


def wait_for_ticket(door: socket.socket, ticket: bytes, seconds: float) -> socket.socket | None:
    """The connection that begins with the ticket, or None if there is none in time; what others say does not matter."""
    door.setblocking(False)
    until = time.monotonic() + seconds
    said: dict[socket.socket, bytes] = {}  # what each connection has said
    found: socket.socket | None = None
    while found is None and (left := until - time.monotonic()) > 0:
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


def rate(come: list[tuple[float, int]]) -> float:
    """Bits per second, from when how many bytes had come in all, without the beginning."""
    begin = come[0][0] + SKIPPED * (come[-1][0] - come[0][0])
    start = next(index for index, (when, _) in enumerate(come) if when >= begin)
    start = min(start, max(len(come) - 2, 0))
    seconds = come[-1][0] - come[start][0]
    return 8 * (come[-1][1] - come[start][1]) / seconds if seconds > 0 else 0.0


def reduce(_: socket.socket, pairs: list[tuple[int, int]]) -> Reply:
    """All-reduce over each pair of ranks, by Horovod."""
    from hvdtrain.bench.pairs import run

    return {"reduced": run([(one, other) for one, other in pairs])}


COMMANDS: dict[str, Callable[..., Reply]] = {"burn": burn, "link": link, "serve": serve, "reduce": reduce}
