"""HTTP between the processes of one run, signed with the secret that they share.

    request   METHOD PATH                    Hvdtrain-Signature: CLIENT NUMBER DIGEST MAC
              DIGEST = SHA-256(body)         MAC = HMAC(secret, request METHOD PATH ADDRESS:PORT CLIENT NUMBER DIGEST)
    answer    STATUS                         Hvdtrain-Signature: MAC
                                             MAC = HMAC(secret, answer REQUEST-MAC STATUS SHA-256(body))

The secret is never sent. CLIENT is a random name of one process and NUMBER counts its requests: a server answers each
number once, so that a recorded request has no effect when it is replayed, and ADDRESS:PORT makes it useless for another
server. The answer's MAC proves to the client that the server belongs to the run too. Nothing is encrypted.

A server reads no body and calls no handler before it has checked the MAC. Connections without a valid request are
limited in number and time; the oldest is closed when a new one arrives.

Imports the standard library only: Horovod's own server and clients use a copy (native/patches/20-signed-http.patch).
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

SECRET = "HVDTRAIN_SECRET"  # environment variable with the secret of a run; its characters are the key
SHORTEST = 32  # minimum number of characters of a secret
HEADER = "Hvdtrain-Signature"
READ_SECONDS = 5.0  # time limit for the next bytes of a request
STRANGER_SECONDS = 10.0  # time limit for a connection to send a signed request
MOST_STRANGERS = 256  # maximum number of connections without a signed request
LARGEST_BODY = 16 << 20  # maximum number of bytes of a request
WINDOW = 1024  # so many requests of a client may be in flight at once


class NotSigned(OSError):
    """Raised when the other side, or this side, does not have the run's secret."""


def new_secret() -> str:
    """Return a secret for a new run."""
    return secrets.token_hex(32)


def give_secret(environ: MutableMapping[str, str]) -> None:
    """Add a new secret to an environment that has none."""
    if not environ.get(SECRET):
        environ[SECRET] = new_secret()


def read_key(environ: Mapping[str, str] | None = None) -> bytes:
    """Return the key of the run to which this process belongs.

    Raises:
        NotSigned: The environment has no secret, or one that is too short.
    """
    secret = (os.environ if environ is None else environ).get(SECRET, "")
    if len(secret) < SHORTEST:
        raise NotSigned(f"{SECRET} has {len(secret)} characters; expected at least {SHORTEST}: the secret of the run")
    return secret.encode()


def authenticate(key: bytes, *words: object) -> str:
    """Return the hexadecimal MAC of words, none of which may contain a space."""
    return hmac.new(key, " ".join(map(str, words)).encode(), hashlib.sha256).hexdigest()


def hash_body(body: bytes) -> str:
    """Return the hexadecimal SHA-256 of a body."""
    return hashlib.sha256(body).hexdigest()


class SignedClient:
    """Send signed requests and accept only signed answers. Threads may share a client, processes may not."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.name = secrets.token_hex(16)
        self.numbers = itertools.count(1)

    def request(
        self, address: str, port: int, method: str, path: str, body: bytes = b"", timeout: float | None = None
    ) -> tuple[int, bytes]:
        """Send a request, never through a proxy, and return the answer's status and body.

        Raises:
            NotSigned: The answer is not signed.
            OSError, http.client.HTTPException: There is no answer.
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
    """Answer requests that are signed with `key`; `handler.answer` is called in a thread of each connection."""

    daemon_threads = True
    request_queue_size = 1024
    largest_body = LARGEST_BODY

    def __init__(self, address: tuple[str, int], handler: type[SignedHandler], key: bytes) -> None:
        self.key = key
        self.lock = threading.Lock()
        self.seen: dict[str, tuple[int, int]] = {}  # by client: largest number, and a bit for each one before
        self.strangers: dict[socket.socket, float] = {}  # monotonic time of arrival, oldest first
        super().__init__(address, handler)

    def is_new(self, client: str, number: int) -> bool:
        """Record a client's request number; return whether it is new (sliding window of RFC 6347, 4.1.2.6)."""
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
        """Print nothing: unauthenticated clients must not be able to fill the output."""


class SignedHandler(BaseHTTPRequestHandler):
    """Handle the requests of one connection; subclasses implement `answer`."""

    server: SignedServer
    timeout = READ_SECONDS

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of the answer to a request that is signed and new."""
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
        """Return the MAC and the body's digest of a request; ("", "") if it is not signed, or not new."""
        client, number, digest, mac = (*self.headers.get(HEADER, "").split(" "), "", "", "", "")[:4]
        address, port = self.connection.getsockname()[:2]
        words = ("request", self.command, self.path, f"{address}:{port}", client, number, digest)
        right = authenticate(self.server.key, *words)
        if not hmac.compare_digest(mac.encode("utf-8", "replace"), right.encode()):
            return "", ""
        return (mac, digest) if self.server.is_new(client, int(number)) else ("", "")

    def refuse(self, status: int) -> None:
        """Answer with a status only, unsigned, and close the connection."""
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: unauthenticated clients must not be able to fill the output."""
