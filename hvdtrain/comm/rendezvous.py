"""Where ranks find each other: a server for Horovod's own HTTP store, in an elastic run one for each generation.

Nothing that an earlier generation left behind is in it, it listens on one address only, and it answers requests that
are signed with the run's secret (hvdtrain/system/signed_http.py).
"""

from __future__ import annotations

import threading

from hvdtrain.system import signed_http
from hvdtrain.system.signed_http import SignedHandler, SignedServer

GET_WAIT_SECONDS = 1.0  # seconds; Gloo asks again, every 10 ms, until its own time is up


class RendezvousServer(SignedServer):
    """Keeps what is PUT to /scope/key. It lives until `end`, for Gloo's later contexts (process sets).

    A GET for what is not there yet is answered when it comes, or by 404 after WAIT.
    """

    def __init__(self, address: str, assignments: dict[str, str], port: int = 0, key: bytes | None = None) -> None:
        """Start to serve.

        Args:
            assignments: Horovod's answers to `/rank_and_size/host:local_rank`.
            port: 0 for any.
            key: that requests are signed with; by default the run's, from the environment.

        Raises:
            OSError: the port is taken, or the environment has no secret.
        """
        self.values = {f"/rank_and_size/{slot}": text.encode() for slot, text in assignments.items()}
        self.values_changed = threading.Condition()
        super().__init__((address, port), RendezvousHandler, key or signed_http.read_key())
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def stop_serving(self) -> None:
        """Answer nobody any more. Returns at once; the port is free some 50 ms later."""
        threading.Thread(target=self._shut_down, daemon=True).start()

    def _shut_down(self) -> None:
        self.shutdown()
        self.server_close()


class RendezvousHandler(SignedHandler):
    server: RendezvousServer

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
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
        # Horovod sends DELETE when it has found its peers; they may still be reading.
        return 200, b""
