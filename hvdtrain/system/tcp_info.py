"""What the kernel knows of this process's TCP connections: bytes that arrived, and how long bytes were under way.

It is read from the sockets that any library in this process has opened (Gloo, NCCL, MPI), and sends nothing.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

ESTABLISHED = 1
# Offsets in struct tcp_info (linux/tcp.h): bytes_acked; delivery_rate, busy_time and rwnd_limited in microseconds.
ACKED, RATE_AND_BUSY = struct.Struct("120xQ"), struct.Struct("160xQQQ")


@dataclass(frozen=True)
class TcpTraffic:
    """What one end of a connection has sent.

    Attributes:
        local: "address:port" of this end.
        remote: of the other end.
        delivered: bytes that the other end has acknowledged.
        busy: seconds in which bytes were under way, but for those in which the other process did not read. A late
            acknowledgement of a few bytes counts.
        rate: bytes/s at which bytes arrived last, as the kernel measures it for its congestion control.
    """

    local: str
    remote: str
    delivered: int
    busy: float
    rate: float


class TcpMonitor:
    """Reads what connections have sent since the last time."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], TcpTraffic] = {}
        self.read_changes()

    def read_changes(self) -> list[TcpTraffic]:
        """Return the traffic of each connection that has sent something since the last call."""
        now = {(one.local, one.remote): one for one in read_connections()}
        changes = []
        for key, one in now.items():
            before = self._last.get(key)
            if before is not None and one.delivered > before.delivered:
                busy = round(max(one.busy - before.busy, 0.0), 6)
                changes.append(TcpTraffic(one.local, one.remote, one.delivered - before.delivered, busy, one.rate))
        self._last = now
        return changes


def read_connections() -> list[TcpTraffic]:
    """Return what each established TCP connection of this process has sent; none where the kernel does not count."""
    found = []
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 - names, not paths
    except OSError:
        return []
    for descriptor in descriptors:
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):  # noqa: PTH115
                continue
            # Of a duplicate: the owner may close its own at any time.
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                traffic = _read_traffic(connection)
        except OSError:
            continue
        if traffic is not None:
            found.append(traffic)
    return found


def _read_traffic(connection: socket.socket) -> TcpTraffic | None:
    if connection.type != socket.SOCK_STREAM:
        return None
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) < RATE_AND_BUSY.size or info[0] != ESTABLISHED:
        return None
    (acked,), (rate, busy, unread) = ACKED.unpack_from(info), RATE_AND_BUSY.unpack_from(info)
    local, remote = format_end(connection.getsockname()), format_end(connection.getpeername())
    return TcpTraffic(local, remote, acked, max(busy - unread, 0) / 1e6, float(rate))


def format_end(end: tuple[str, int]) -> str:
    """Return "address:port"; an IPv4 address is the same in a socket of IPv6."""
    return f"{end[0].removeprefix('::ffff:')}:{end[1]}"
