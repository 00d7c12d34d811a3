"""A server's messages with workers that come and go while it runs: both are messages themselves.

["joined", ...]     the first message of a process that has connected; it gets the smallest rank that nobody has
["lost"]            the last one of a process whose connection has broken
"""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.comm.socket_messages import MessageListener, SocketMessages


class CrewMessages(SocketMessages):
    """Messages of the process that serves, which is rank 0."""

    def __init__(self, listener: MessageListener, look: Callable[[], object]) -> None:
        """Accept connections from now on. look: as for `SocketMessages`."""
        super().__init__(look)
        self._listener = listener

    def send(self, to: int, value: object, body: NDArray[np.uint8] | None = None) -> None:
        """Send a message; if the process is lost, `receive` reports it."""
        with contextlib.suppress(collectives.PeersLost):
            if to in self.peers:
                super().send(to, value, body)

    def receive(self, body: NDArray[np.uint8] | None = None, source: int | None = None) -> tuple[int, Any]:
        """Wait for a message, or the loss of a process; return whose, and its value."""
        rank = self.wait_for_message(source)
        try:
            return super().receive(body, rank)
        except collectives.PeersLost:
            self.remove_peer(rank)
            return rank, ["lost"]

    def look_around(self) -> None:
        """Let in who has connected meanwhile."""
        with contextlib.suppress(queue.Empty):
            while True:
                _, connection = self._listener.arrived.get_nowait()
                rank = next(rank for rank in itertools.count(1) if rank not in self.peers)
                self.add_peer(rank, connection)
        super().look_around()

    def close(self) -> None:
        """Stop listening, and close all connections."""
        self._listener.close()
        super().close()
