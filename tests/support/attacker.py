"""Somebody on the network who plays against a run: finds what listens, sends what nobody should, replays requests."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import re
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

import psutil

from tests.support.limits import stretch

JUNK = [
    b"\x00" * 4096,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    b"GET " + b"/a" * 40_000,
    b"\xff" * 36 + b"\xff\xff\xff\x7f",
]
UNLIMITED = b"PUT /hvdtrain.facts/big HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 65536


class Touch:
    """What touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def listeners(processes: Iterable[psutil.Process]) -> set[tuple[str, int]]:
    """Where processes listen: address and port."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            connections = process.net_connections("tcp")
            found |= {tuple(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN}
    return found


def put(path: str, body: bytes) -> bytes:
    """An unsigned PUT."""
    return f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def forged_requests(touched: Path) -> list[bytes]:
    """Requests that change a run if they are believed."""
    evil = pickle.dumps(Touch(touched))
    verdict = json.dumps({"code": 1, "error": "forged"}).encode()
    plan = json.dumps({"members": [], "server": ["127.0.0.1", 9], "root": 0, "step": 0, "error": "forged"}).encode()
    requests = [
        put("/worker_addresses/localhost:0", base64.b64encode(evil)),
        put("/runfunc/func", base64.b64encode(evil)),
        put("/hvdtrain.facts/verdict", verdict),
        *(put(f"/hvdtrain.facts/plan-{number}", plan) for number in range(1, 10)),
        put("/hvdtrain.facts/gone-localhost:0", b'"lost"'),
        put("/hvdtrain.rounds/newest", b"99999"),
        put("/global/0", b"\x00" * 100),
        b"DELETE /global/0 HTTP/1.1\r\n\r\n",
        b"HEAD /etc/passwd HTTP/1.1\r\n\r\n",
        b"GET /rank_and_size/localhost:0 HTTP/1.1\r\n\r\n",
        b"GET /hvdtrain.facts/* HTTP/1.1\r\n\r\n",
    ]
    # As horovodrun's services frame their pickles: a digest, a length, and the message.
    wire = [b"\x00" * 32 + len(evil).to_bytes(4, "little") + evil]
    return requests + wire


def send(where: tuple[str, int], data: bytes, seconds: float = 2.0) -> bytes:
    """What is answered to some bytes; b"" if the connection is refused, cut or silent."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(where, seconds) as connection:
        connection.settimeout(seconds)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(65536):
            answer += data
    return answer


class SilentConnections:
    """Connections that say nothing, as of a port scanner, as long as the block lasts."""

    def __init__(self, where: Iterable[tuple[str, int]], count: int) -> None:
        self.connections = []
        for address in where:
            for _ in range(count):
                with contextlib.suppress(OSError):
                    self.connections.append(socket.create_connection(address, 2))

    def __enter__(self) -> SilentConnections:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.close()


class Recorder:
    """Records signed requests on the loopback interface, as anybody who sees the network can. Needs root."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.socket.bind(("lo", 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self.socket.settimeout(0.2)
        self.seen: dict[int, list[bytes]] = {}  # by port
        self.over = False
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        while not self.over:
            with contextlib.suppress(TimeoutError):
                frame = self.socket.recv(1 << 17)
                ip = frame[14:]
                if frame[12:14] != b"\x08\x00" or ip[9] != 6:
                    continue
                tcp = ip[(ip[0] & 15) * 4 :]
                data = tcp[(tcp[12] >> 4) * 4 :]
                if re.match(rb"(PUT|GET|DELETE) \S+ HTTP.*Hvdtrain-Signature: ", data, re.DOTALL):
                    self.seen.setdefault(int.from_bytes(tcp[2:4], "big"), []).append(data)

    def close(self) -> dict[int, list[bytes]]:
        """What was seen, each request once."""
        self.over = True
        self.thread.join(stretch(10))
        self.socket.close()
        return {port: list(dict.fromkeys(requests)) for port, requests in self.seen.items()}


def attack(processes: Iterable[psutil.Process], touched: Path) -> list[bytes]:
    """Send all that is bad to everything that listens; the answers that are not refusals."""
    accepted = []
    ports = listeners(processes)
    assert ports, "nothing listens"
    for where in ports:
        for data in [*JUNK, UNLIMITED, *forged_requests(touched)]:
            answer = send(where, data, 0.5)
            if answer.startswith(b"HTTP/") and not re.match(rb"HTTP/1\.\d (400|401|405|413|414|431|501|505) ", answer):
                accepted.append(data[:80] + b" -> " + answer[:80])
    return accepted
