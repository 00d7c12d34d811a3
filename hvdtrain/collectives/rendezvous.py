"""Where ranks find each other: a server for Horovod's own HTTP store, in an elastic run one for each generation.

Nothing that an earlier generation left behind is in it, and it listens on one address only.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WAIT = 1.0  # seconds; Gloo asks again, every 10 ms, until its own time is up


class Server(ThreadingHTTPServer):
    """Keeps what is PUT to /scope/key. It lives until `end`, for Gloo's later contexts (process sets).

    A GET for what is not there yet is answered when it comes, or by 404 after WAIT.
    """

    daemon_threads = True

    def __init__(self, address: str, assignments: dict[str, str], port: int = 0) -> None:
        """assignments: Horovod's answers to `/rank_and_size/host:local_rank`. port: 0 for any.

        Raises OSError if the port is taken.
        """
        self.values = {f"/rank_and_size/{slot}": text.encode() for slot, text in assignments.items()}
        self.changed = threading.Condition()
        super().__init__((address, port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def end(self) -> None:
        """Answer nobody any more. Returns at once; the port is free some 50 ms later."""
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with self.server.changed:
            self.server.changed.wait_for(lambda: self.path in self.server.values, WAIT)
            value = self.server.values.get(self.path)
        self._answer(value)

    def do_PUT(self) -> None:
        value = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.changed:
            self.server.values[self.path] = value
            self.server.changed.notify_all()
        self._answer(b"")

    def do_DELETE(self) -> None:
        # Horovod says so when it has found its peers; they may still be reading.
        self._answer(b"")

    def _answer(self, value: bytes | None) -> None:
        self.send_response(404 if value is None else 200)
        self.send_header("Content-Length", str(len(value or b"")))
        self.end_headers()
        self.wfile.write(value or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass
