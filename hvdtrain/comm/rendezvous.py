"""Serve Horovod's own HTTP store, in which ranks find each other; in an elastic run each generation has one.

It holds nothing of an earlier generation, listens on one address only, and answers only requests that are signed with
the run's secret (hvdtrain/system/signed_http.py).
"""

from __future__ import annotations

import threading

from hvdtrain.system import signed_http
from hvdtrain.system.signed_http import SignedHandler, SignedServer

GET_WAIT_SECONDS = 1.0  # Gloo asks again every 10 ms, until its own time limit


class RendezvousServer(SignedServer):
    """Keeps what is PUT to /scope/key, until `stop_serving`: Gloo's later contexts (process sets) need it too.

    A GET for a missing key is answered when the key is written, or by 404 after GET_WAIT_SECONDS.
    """

    def __init__(self, address: str, assignments: dict[str, str], port: int = 0, key: bytes | None = None) -> None:
        """Start to serve.

        Args:
            address: this host's, to listen on.
            assignments: Horovod's answers to `/rank_and_size/host:local_rank`.
            port: 0 for any.
            key: with which requests are signed; None: the run's, from the environment.

        Raises:
            OSError: the port is taken, or the environment has no secret.
        """
        self.values = {f"/rank_and_size/{slot}": text.encode() for slot, text in assignments.items()}
        self.values_changed = threading.Condition()
        super().__init__((address, port), RendezvousHandler, key or signed_http.read_key())
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    def stop_serving(self) -> None:
        """Stop answering. Returns at once; the port is free some 50 ms later."""
        threading.Thread(target=self._shut_down, daemon=True).start()

    def _shut_down(self) -> None:
        self.shutdown()
        self.server_close()


class RendezvousHandler(SignedHandler):
    """Answers one connection to a RendezvousServer."""

    server: RendezvousServer

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Store or look up a value; return the status and body of the answer."""
        server = self.server
        if method == "GET":
            with server.values_changed:
                server.values_changed.wait_for(lambda: path in server.values, GET_WAIT_SECONDS)
                value = server.values.get(path)
            return (404, b"") if value is None else (200, value)
        if method == "PUT":
            with server.values_changed:
                server.values[path] = body
                server.values_changed.notify_all()
        if method == "DELETE":  # by a rank, of its own key, after a barrier: all have read it, and may meet again
            with server.values_changed:
                server.values.pop(path, None)
        return 200, b""
