"""Messages between two processes of an MPI job, over mpi4py, next to Horovod's collectives.

Waiting polls, at intervals from 20 us to 1 ms: MPI's own calls spin, which on a small host takes the core that the
other process computes on.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST_INTERVAL, LAST_INTERVAL = 20e-6, 1e-3  # seconds between two looks
TAG_HEAD, TAG_BODY = 1, 2


def was_started_by_mpi() -> bool:
    """Return whether mpirun, and not horovodrun over Gloo, has started this process."""
    started = any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK"))
    return started and "HOROVOD_RANK" not in os.environ


class MpiMessages:
    """Messages by MPI: see `hvdtrain.comm.messages.Messages`."""

    def __init__(self) -> None:
        """All processes of the job call it."""
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD.Dup()

    def send(self, to: int, value: object, body: NDArray[np.uint8] | None = None) -> None:
        """Send a message, and return when the arrays may be changed."""
        size = 0 if body is None else body.nbytes
        head = np.frombuffer(json.dumps([size, value]).encode(), np.uint8)
        requests = [self._comm.Isend(head, dest=to, tag=TAG_HEAD)]
        if size:
            requests.append(self._comm.Isend(body, dest=to, tag=TAG_BODY))
        wait_until(lambda: all(request.Test() for request in requests))

    def receive(self, body: NDArray[np.uint8] | None = None, source: int | None = None) -> tuple[int, Any]:
        """Wait for a message; return who has sent it, and its value."""
        status = self._mpi.Status()
        wanted = self._mpi.ANY_SOURCE if source is None else source
        wait_until(lambda: self._comm.Iprobe(source=wanted, tag=TAG_HEAD, status=status))
        head = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
        self._comm.Recv(head, source=status.source, tag=TAG_HEAD)
        size, value = json.loads(head.tobytes())
        if size:
            assert body is not None and body.nbytes == size, f"{size} bytes, which are not expected"
            request = self._comm.Irecv(body, source=status.source, tag=TAG_BODY)
            wait_until(request.Test)
        return int(status.source), value

    def close(self) -> None:
        """Do nothing: MPI connects the processes until they end."""


def wait_until(is_done: Any) -> None:
    """Return when `is_done()` is true."""
    interval = FIRST_INTERVAL
    while not is_done():
        time.sleep(interval)
        interval = min(LAST_INTERVAL, 1.5 * interval)
