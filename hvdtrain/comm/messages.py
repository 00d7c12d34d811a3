"""Messages between two ranks, next to Horovod's collectives: by MPI if it connects the ranks, else over sockets."""

from __future__ import annotations

from typing import Any, Protocol

import horovod.torch as hvd
import numpy as np
from numpy.typing import NDArray

from hvdtrain.comm.mpi_messages import MpiMessages
from hvdtrain.comm.socket_messages import connect_sockets
from hvdtrain.comm.world import World


class Messages(Protocol):
    """Sends and receives messages: a small JSON value and an array of bytes, which may be empty.

    Messages from one process to another arrive in the order in which they were sent.
    """

    def send(self, to: int, value: object, body: NDArray[np.uint8] | None = None) -> None:
        """Send a message, and return when the arrays may be changed."""

    def receive(self, body: NDArray[np.uint8] | None = None, source: int | None = None) -> tuple[int, Any]:
        """Wait for a message; return who has sent it, and its value.

        Args:
            body: receives the array of bytes: of its size, if there is any.
            source: whose message; None: the first one's that comes.
        """

    def close(self) -> None:
        """Close what connects the processes, if it is not the launcher's."""


def connect_messages(world: World, servers: int) -> Messages:
    """Let the first `servers` ranks and all others send each other messages; all ranks of Horovod's world call it."""
    return MpiMessages() if hvd.mpi_enabled() else connect_sockets(world, servers)
