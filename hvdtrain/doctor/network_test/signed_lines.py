"""Signed lines of JSON over a connection, as the coordinator and the workers of the network test send them.

The coordinator begins with a nonce. Each line is `MAC JSON` and a newline. The MAC covers the nonces of both sides, who
sends the line, and its number: a line counts once, on this connection, and only from somebody who knows the run's
secret. A worker puts its own nonce before its first line.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from hvdtrain.system import signed_http
from hvdtrain.system.strict_json import parse_strict_json

NONCE_LENGTH = 64  # characters
MAX_FIRST_LINE_BYTES = 4096  # of the first line, which anybody may send
MAX_LINE_BYTES = 1 << 20  # of any other
COORDINATOR, WORKER = "coordinator", "worker"


class SignedLines:
    """The lines of one connection, as one side writes and the other reads them."""

    def __init__(self, key: bytes, session: str, own_role: str, other_role: str) -> None:
        """Begin a session.

        Args:
            key: the secret of the run.
            session: the nonces of both sides.
            own_role: who this side is.
            other_role: who the other side is.
        """
        self.key, self.session, self.own_role, self.other_role = key, session, own_role, other_role
        self.lines_written = self.lines_read = 0

    def sign_line(self, value: Any) -> bytes:
        """Return the next line to send, with a JSON value."""
        text = json.dumps(value)
        self.lines_written += 1
        return f"{self._compute_mac(self.own_role, self.lines_written, text)} {text}\n".encode()

    def verify_line(self, line: bytes) -> Any:
        """Return the value in the next line that arrived.

        Raises:
            ValueError: the other side did not send it, or it is not JSON.
        """
        mac, _, text = line.decode().rstrip("\n").partition(" ")
        self.lines_read += 1
        if not hmac.compare_digest(mac.encode(), self._compute_mac(self.other_role, self.lines_read, text).encode()):
            raise ValueError("a line without this run's signature")
        return parse_strict_json(text.encode())

    def _compute_mac(self, role: str, number: int, text: str) -> str:
        return signed_http.authenticate(self.key, self.session, role, number, signed_http.hash_body(text.encode()))


def join_session(key: bytes, coordinators_nonce: bytes) -> tuple[SignedLines, bytes]:
    """Return a worker's lines to the coordinator, and what it puts before the first of them."""
    own = signed_http.new_secret()
    return SignedLines(key, f"{coordinators_nonce.decode().strip()}-{own}", WORKER, COORDINATOR), f"{own} ".encode()


def accept_session(key: bytes, own_nonce: str, first: bytes) -> tuple[SignedLines, Any]:
    """Return the coordinator's lines to a worker, and the value in the worker's first line.

    Raises:
        ValueError: the line is not signed.
    """
    nonce, _, line = first.partition(b" ")
    lines = SignedLines(key, f"{own_nonce}-{nonce.decode()}", COORDINATOR, WORKER)
    return lines, lines.verify_line(line)
