"""Signed lines over a connection: how the doctor and its ranks talk.

The doctor begins with a nonce. Each line is `MAC JSON` and a line end; the MAC covers both sides' nonces, who speaks,
and the line's number, so that no line counts twice, elsewhere, or from anybody who does not know the run's secret.
A rank puts its own nonce before its first line.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from hvdtrain.system import signed_http

NONCE_CHARACTERS = 64  # characters
MAX_FIRST_LINE_BYTES = 4096  # bytes of the first line, which anybody may send
MAX_LINE_BYTES = 1 << 20  # bytes of any other


class SignedLines:
    """The lines of one connection, as one side writes and the other reads them."""

    def __init__(self, key: bytes, session: str, own: str, other: str) -> None:
        """session: the nonces of both. own, other: who this side is, and who the other one is."""
        self.key, self.session, self.own_role, self.other_role = key, session, own, other
        self.lines_written = self.lines_read = 0

    def sign_line(self, value: Any) -> bytes:
        """The next line to send."""
        text = json.dumps(value)
        self.lines_written += 1
        return f"{self._compute_mac(self.own_role, self.lines_written, text)} {text}\n".encode()

    def verify_line(self, line: bytes) -> Any:
        """The value in the next line that came. Raises ValueError if the other side did not send it."""
        mac, _, text = line.decode().rstrip("\n").partition(" ")
        self.lines_read += 1
        if not hmac.compare_digest(mac.encode(), self._compute_mac(self.other_role, self.lines_read, text).encode()):
            raise ValueError("a line without this run's signature")
        return json.loads(text)

    def _compute_mac(self, who: str, number: int, text: str) -> str:
        return signed_http.authenticate(self.key, self.session, who, number, signed_http.hash_body(text.encode()))


def join_session(key: bytes, doctors_nonce: bytes) -> tuple[SignedLines, bytes]:
    """A rank's lines to the doctor, and what it puts before the first one."""
    own = signed_http.new_secret()
    return SignedLines(key, f"{doctors_nonce.decode().strip()}-{own}", "rank", "doctor"), f"{own} ".encode()


def accept_session(key: bytes, own_nonce: str, first: bytes) -> tuple[SignedLines, Any]:
    """The doctor's lines to a rank, and the value of the rank's first line. Raises ValueError if it is not signed."""
    nonce, _, line = first.partition(b" ")
    lines = SignedLines(key, f"{own_nonce}-{nonce.decode()}", "doctor", "rank")
    return lines, lines.verify_line(line)
