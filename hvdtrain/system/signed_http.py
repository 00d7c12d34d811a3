"""HTTP between the processes of one run, signed with the secret that they share.

    request   METHOD PATH                    Hvdtrain-Signature: CLIENT NUMBER DIGEST MAC
              DIGEST = SHA-256(body)         MAC = HMAC(secret, request METHOD PATH ADDRESS:PORT CLIENT NUMBER DIGEST)
    answer    STATUS                         Hvdtrain-Signature: MAC
                                             MAC = HMAC(secret, answer REQUEST-MAC STATUS SHA-256(body))

The secret never travels. CLIENT is one process's random name and NUMBER counts its requests: a server answers a number
once, so that a request that somebody recorded does nothing when it is sent again, and ADDRESS:PORT keeps it from
another server. The client knows by the answer's MAC that the server belongs to the run too. Nothing is encrypted.

A server reads no body, and calls nothing, before it has checked the MAC; connections that have not shown one are
limited in number and time, and the oldest of them is closed for the next.

The standard library only: Horovod's own server and clients use this very file (native/patches).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, MutableMapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "HVDTRAIN_SECRET"  # the variable that holds a run's secret: its characters are the key
SHORTEST = 32  # characters of a secret
HEADER = "Hvdtrain-Signature"
READ_SECONDS = 5.0  # for the next bytes of a request
STRANGER_SECONDS = 10.0  # for a connection to show a signature
MOST_STRANGERS = 256  # connections that have not shown one yet
LARGEST_BODY = 16 << 20  # bytes of a request
WINDOW = 1024  # so many numbers of a client may be under way at once


class NotSigned(OSError):
    """The other side does not know the run's secret, or this side does not."""


def new_secret() -> str:
    """A secret for a new run."""
    return secrets.token_hex(32)


def give_secret(environ: MutableMapping[str, str]) -> None:
    """Put a new secret into an environment that has none."""
    if not environ.get(SECRET):
        environ[SECRET] = new_secret()


def read_key(environ: Mapping[str, str] | None = None) -> bytes:
    """The key of this process's run.

    Raises:
        NotSigned: the environment has no secret, or a short one.
    """
    secret = (os.environ if environ is None else environ).get(SECRET, "")
    if len(secret) < SHORTEST:
        raise NotSigned(f"{SECRET} has {len(secret)} characters; expected at least {SHORTEST}: the secret of the run")
    return secret.encode()


def authenticate(key: bytes, *words: object) -> str:
    """The MAC of some words, none of which contains a space; hexadecimal."""
    return hmac.new(key, " ".join(map(str, words)).encode(), hashlib.sha256).hexdigest()


def hash_body(body: bytes) -> str:
    """The SHA-256 of a body, hexadecimal."""
    return hashlib.sha256(body).hexdigest()


class SignedClient:
    """Sends signed requests and takes signed answers only. Threads may share it, processes may not."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.name = secrets.token_hex(16)
        self.numbers = itertools.count(1)

    def request(
        self, address: str, port: int, method: str, path: str, body: bytes = b"", timeout: float | None = None
    ) -> tuple[int, bytes]:
        """The answer's status and body. No proxy is asked.

        Raises:
            NotSigned: the answer is not signed.
            OSError, http.client.HTTPException: there is no answer.
        """
        connection = http.client.HTTPConnection(address, port, timeout=timeout)
        with contextlib.closing(connection):
            connection.connect()
            peer = connection.sock.getpeername()
            number, digest = next(self.numbers), hash_body(body)
            mac = authenticate(self.key, "request", method, path, f"{peer[0]}:{peer[1]}", self.name, number, digest)
            connection.request(method, path, body, {HEADER: f"{self.name} {number} {digest} {mac}"})
            answer = connection.getresponse()
            text = answer.read()
        signature = authenticate(self.key, "answer", mac, answer.status, hash_body(text))
        if not hmac.compare_digest(answer.headers.get(HEADER, "").encode(), signature.encode()):
            raise NotSigned(f"{address}:{port} answers {answer.status} to {method} {path} without this run's signature")
        return answer.status, text


class SignedServer(ThreadingHTTPServer):
    """Answers requests that are signed with `key`, each by `handler.answer` in a thread of its own."""

    daemon_threads = True
    request_queue_size = 1024
    largest_body = LARGEST_BODY

    def __init__(self, address: tuple[str, int], handler: type[SignedHandler], key: bytes) -> None:
        self.key = key
        self.lock = threading.Lock()
        self.seen: dict[str, tuple[int, int]] = {}  # of each client: its largest number, and a bit for each before it
        self.strangers: dict[socket.socket, float] = {}  # when they came, by the monotonic clock; the first ones first
        super().__init__(address, handler)

    def is_new(self, client: str, number: int) -> bool:
        """Whether this number of a client comes for the first time; notes it (a window as in RFC 6347, 4.1.2.6)."""
        with self.lock:
            largest, bits = self.seen.get(client, (0, 0))
            ahead = number - largest
            if ahead > 0:
                bits = (bits << ahead | 1 if ahead < WINDOW else 1) & (1 << WINDOW) - 1
                self.seen[client] = (number, bits)
                return True
            if -ahead >= WINDOW or bits >> -ahead & 1:
                return False
            self.seen[client] = (largest, bits | 1 << -ahead)
            return True

    def process_request(self, request: Any, client_address: Any) -> None:
        now = time.monotonic()
        with self.lock:
            self.strangers[request] = now
            excess = len(self.strangers) - MOST_STRANGERS
            since = enumerate(self.strangers.items())
            over = [one for place, (one, came) in since if place < excess or now - came > STRANGER_SECONDS]
        for stranger in over:
            self.forget_stranger(stranger)
            with contextlib.suppress(OSError):
                stranger.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.forget_stranger(request)
        super().shutdown_request(request)

    def forget_stranger(self, connection: socket.socket) -> None:
        with self.lock:
            self.strangers.pop(connection, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Strangers must not be able to fill the output."""


class SignedHandler(BaseHTTPRequestHandler):
    """One request; a subclass has `answer`."""

    server: SignedServer
    timeout = READ_SECONDS

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer to a request that is signed and new."""
        raise NotImplementedError

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            return self.refuse(400)
        if len(length) > 12 or int(length) > self.server.largest_body:
            return self.refuse(413)
        mac, digest = self.check_signature()
        if not mac:
            return self.refuse(401)
        self.server.forget_stranger(self.connection)
        body = self.rfile.read(int(length))
        if hash_body(body) != digest:
            return self.refuse(401)
        status, text = self.answer(self.command, self.path, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header(HEADER, authenticate(self.server.key, "answer", mac, status, hash_body(text)))
        self.end_headers()
        self.wfile.write(text)
        return None

    do_PUT = do_DELETE = do_GET

    def do_HEAD(self) -> None:
        self.refuse(405)

    do_POST = do_OPTIONS = do_PATCH = do_TRACE = do_CONNECT = do_HEAD

    def check_signature(self) -> tuple[str, str]:
        """The request's MAC and what it says is the digest of its body; ("", "") if it is not signed, or not new."""
        client, number, digest, mac = (*self.headers.get(HEADER, "").split(" "), "", "", "", "")[:4]
        address, port = self.connection.getsockname()[:2]
        words = ("request", self.command, self.path, f"{address}:{port}", client, number, digest)
        right = authenticate(self.server.key, *words)
        if not hmac.compare_digest(mac.encode("utf-8", "replace"), right.encode()):
            return "", ""
        return (mac, digest) if self.server.is_new(client, int(number)) else ("", "")

    def refuse(self, status: int) -> None:
        """Answer without a signature, and nothing more."""
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Strangers must not be able to fill the output."""
