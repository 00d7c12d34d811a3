"""One worker's measurements, by sockets of its own: round trips and rates to other workers, and the CPU.

The sender of a probe connects, shows its ticket, sends "?" for each round trip, then "." and data for some seconds. The
receiver returns each "?" and measures the rate of the data.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import socket
import statistics
import struct
import time

from hvdtrain.doctor.network_test.messages import Failure, ProbeLink, ProbeReply, ServeReply
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import Deadline

TICKET_TIMEOUT = DoctorLimits.link_connect + 0.5  # seconds
MAX_PINGS, MAX_PING_SECONDS = 30, 3.0  # whichever is reached first
# Of the time of sending, not counted: until the connection runs at full speed and the buffers on the way are full.
SKIPPED_FRACTION = 0.1
CPU_MEASURE_SECONDS = 0.1  # of CPU time
CHUNK_BYTES = 1 << 18
LINGER_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close drops what is still to be sent


def measure_cpu() -> float:
    """Return wall time over CPU time of a piece of work: 1 on a host that does nothing else."""
    begin, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < CPU_MEASURE_SECONDS:
        sum(range(1000))
    return (time.perf_counter() - begin) / (time.process_time() - used)


def probe_link(probe: ProbeLink) -> ProbeReply | Failure:
    """Time round trips to another worker, then send to it for some seconds; it measures the rate."""
    try:
        connection = socket.create_connection(probe.address, DoctorLimits.link_connect)
    except TimeoutError:
        return Failure("no answer")
    except OSError as error:
        return Failure(error.strerror or str(error))
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(probe.ticket.encode())
        trips: list[float] = []
        while len(trips) < MAX_PINGS and sum(trips) < MAX_PING_SECONDS:
            begin = time.perf_counter()
            connection.sendall(b"?")
            if not connection.recv(1):
                return Failure("closed by the other side")
            trips.append(time.perf_counter() - begin)
        connection.sendall(b".")
        send_data(connection, probe.seconds)
    return ProbeReply(statistics.median(trips))


def send_data(connection: socket.socket, seconds: float) -> None:
    """Send zeros for some seconds; what is then still in the buffers will be dropped when it is closed."""
    data, deadline = bytes(CHUNK_BYTES), Deadline(seconds)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ABORT)
    with contextlib.suppress(TimeoutError):
        while (left := deadline.left()) > 0:
            connection.settimeout(left)
            connection.send(data)


def serve_probe(listener: socket.socket, ticket: str) -> ServeReply | Failure:
    """Return another worker's round trips, and measure the rate at which it sends."""
    connection = wait_for_ticket(listener, ticket.encode(), TICKET_TIMEOUT)
    if connection is None:
        return Failure(f"no connection within {TICKET_TIMEOUT:g} s")
    with connection:
        connection.settimeout(DoctorLimits.link_connect)
        while (ping := connection.recv(1)) == b"?":
            connection.sendall(ping)
        buffer, total = bytearray(CHUNK_BYTES), 0
        arrivals = [(time.perf_counter(), 0)]
        with contextlib.suppress(ConnectionResetError):
            while count := connection.recv_into(buffer):
                total += count
                arrivals.append((time.perf_counter(), total))
    return ServeReply(compute_rate(arrivals))


def wait_for_ticket(listener: socket.socket, ticket: bytes, seconds: float) -> socket.socket | None:
    """Return the connection that begins with the ticket, whatever others send; None if there is none in time."""
    listener.setblocking(False)
    deadline = Deadline(seconds)
    received: dict[socket.socket, bytes] = {}  # by connection
    found: socket.socket | None = None
    while found is None and (left := deadline.left()) > 0:
        ready = select.select([listener, *received], [], [], left)[0]
        if listener in ready:
            with contextlib.suppress(OSError):
                received[listener.accept()[0]] = b""
        for connection in received.keys() & set(ready):
            data = b""
            with contextlib.suppress(OSError):
                data = connection.recv(len(ticket) - len(received[connection]))
            received[connection] += data
            if hmac.compare_digest(received[connection], ticket):
                found = connection
            if not data or len(received[connection]) == len(ticket):
                del received[connection]
                if connection is not found:
                    connection.close()
    for connection in received:
        connection.close()
    return found


def compute_rate(arrivals: list[tuple[float, int]]) -> float:
    """Return the rate in bits per second, without the beginning.

    Args:
        arrivals: when (seconds) how many bytes had arrived in total, in order.
    """
    begin = arrivals[0][0] + SKIPPED_FRACTION * (arrivals[-1][0] - arrivals[0][0])
    start = next(index for index, (when, _) in enumerate(arrivals) if when >= begin)
    start = min(start, max(len(arrivals) - 2, 0))
    seconds = arrivals[-1][0] - arrivals[start][0]
    return 8 * (arrivals[-1][1] - arrivals[start][1]) / seconds if seconds > 0 else 0.0
