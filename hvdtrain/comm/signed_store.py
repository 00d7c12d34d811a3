"""The store by which torch.distributed's groups find their members, next to Horovod: signed, on one interface.

torch's own TCPStore listens on all interfaces and answers everybody.
"""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Sequence
from datetime import timedelta

import horovod.torch as hvd
from torch.distributed.distributed_c10d import Store

from hvdtrain.comm import collectives
from hvdtrain.comm.mailbox import choose_address
from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.system.limits import RendezvousLimits
from hvdtrain.system.network import find_interface
from hvdtrain.system.signed_http import SECRET, SignedClient, new_secret

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # environment variable of torch's Gloo; `hvdtrain launch` sets it
LIMITS = RendezvousLimits()


class SignedStore(Store):
    """A key-value store of torch.distributed in a `RendezvousServer`, as far as groups need one."""

    def __init__(self, address: str, port: int, key: bytes) -> None:
        super().__init__()
        self._target, self._client = (address, port), SignedClient(key)

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value."""
        body = value.encode() if isinstance(value, str) else value
        self._client.request(*self._target, "PUT", f"/torch/{key}", body, LIMITS.server_response)

    def get(self, key: str) -> bytes:
        """Return a value as soon as it was written. Raises RuntimeError if nobody writes it in time."""
        deadline = time.monotonic() + LIMITS.server_start
        while time.monotonic() < deadline:
            try:
                status, value = self._client.request(*self._target, "GET", f"/torch/{key}", b"", LIMITS.server_response)
            except (OSError, http.client.HTTPException) as error:
                raise RuntimeError(f"the store of this world's ranks does not answer: {error}") from error
            if status == 200:
                return value
        raise RuntimeError(f"no rank has written {key} within {LIMITS.server_start:.0f} s")

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are written."""
        for key in keys:
            self.get(key)

    def close(self) -> None:
        """Stop serving, if this rank does: no group is made by this store any more."""


class ServedStore(SignedStore):
    """The store of the rank that serves it."""

    def __init__(self, server: RendezvousServer, key: bytes) -> None:
        super().__init__(str(server.server_address[0]), server.port, key)
        self.server = server

    def close(self) -> None:
        self.server.stop_serving()


def open_store() -> SignedStore:
    """Serve a store on rank 0 of Horovod's world, and return it on all ranks, all of which call this.

    From now on torch's Gloo connects over the interface on which the ranks meet, unless one was chosen.
    """
    served, key = None, agree_on_key()
    if hvd.rank() == 0:
        served = ServedStore(RendezvousServer(choose_address(hvd), {}, key=key), key)
    where = None if served is None else served.server.server_address[:2]
    address, port = collectives.broadcast_json(where, "torch.store")
    if GLOO_INTERFACE not in os.environ:
        os.environ[GLOO_INTERFACE] = find_interface(choose_address(hvd)) or "lo"
    return served or SignedStore(address, port, key)


def agree_on_key() -> bytes:
    """Return the launch's secret; if there is none, one that rank 0 draws. All ranks call it."""
    drawn = collectives.broadcast_json("" if os.environ.get(SECRET) else new_secret(), "comm.key")
    return (drawn or os.environ[SECRET]).encode()
