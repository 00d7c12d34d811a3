"""Messages of the other ranks to rank 0, next to a program's collectives and never in their way.

Nobody waits for a message to arrive, so ranks may send at different times, or stop to. torch.distributed's own store
carries them if the program uses that; a program that uses Horovod gets a signed HTTP server on rank 0.
"""

from __future__ import annotations

import http.client
import itertools
import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from hvdtrain.system.errors import UserError
from hvdtrain.system.limits import DiagnosisLimits
from hvdtrain.system.network import interface_address, resolve_address
from hvdtrain.system.signed_http import SECRET, SignedClient, SignedHandler, SignedServer, new_secret, read_key

SIZE_VARIABLES = ("WORLD_SIZE", "HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE")
ADDRESS_BYTES = 256  # of the announcement of rank 0's server
_numbers = itertools.count()  # of mailboxes, opened in the same order on all ranks


class Mailbox(Protocol):
    """Carries messages to rank 0. Only `send` and `receive` may take long, in a thread of their own."""

    rank: int
    size: int

    def is_ready(self) -> bool:
        """Return whether messages can be sent yet."""

    def send(self, message: bytes) -> None:
        """Send a message of another rank to rank 0. Raises OSError or RuntimeError if it cannot be reached."""

    def receive(self) -> list[bytes]:
        """Return, on rank 0, what has arrived since the last call."""

    def close(self) -> None:
        """Stop serving; what arrives later is refused."""


def open_mailbox() -> Mailbox:
    """Open a mailbox in the world that the program has initialized; all ranks do so at the same place of it.

    Raises:
        UserError: several processes were started, and neither torch.distributed nor Horovod is initialized.
    """
    number = next(_numbers)
    distributed = sys.modules.get("torch.distributed")
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if distributed is not None and is_connected and distributed.get_world_size() > 1:
        return StoreMailbox(distributed, number)
    horovod: Any = sys.modules.get("horovod.torch")
    if horovod is not None and horovod.is_initialized():
        return HorovodMailbox(horovod, number) if horovod.size() > 1 else LocalMailbox()
    if not is_connected:
        reject_unconnected_ranks(os.environ)
    return LocalMailbox()


def reject_unconnected_ranks(environ: Mapping[str, str]) -> None:
    """Raise UserError if a launcher has started several ranks."""
    for name in SIZE_VARIABLES:
        if environ.get(name, "").isdigit() and int(environ[name]) > 1:
            raise UserError(
                f"{name} is {environ[name]}, but neither torch.distributed nor Horovod is initialized in this process: "
                "call torch.distributed.init_process_group() or hvd.init() before the first step"
            )


class LocalMailbox:
    """The mailbox of a process that trains alone."""

    rank, size = 0, 1

    def is_ready(self) -> bool:
        """See `Mailbox.is_ready`."""
        return True

    def send(self, message: bytes) -> None:
        """See `Mailbox.send`."""

    def receive(self) -> list[bytes]:
        """See `Mailbox.receive`."""
        return []

    def close(self) -> None:
        """See `Mailbox.close`."""


class StoreMailbox:
    """Messages in the key-value store of torch.distributed: a counter, and a key for each message."""

    def __init__(self, distributed: Any, number: int) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._store = distributed.PrefixStore(
            f"hvdtrain.diagnose.{number}", distributed.distributed_c10d._get_default_store()
        )
        self._last, self._missing = 0, set[int]()  # numbers that were given to messages, and those not read yet

    def is_ready(self) -> bool:
        """See `Mailbox.is_ready`."""
        return True

    def send(self, message: bytes) -> None:
        """See `Mailbox.send`."""
        self._store.set(str(self._store.add("count", 1)), message)

    def receive(self) -> list[bytes]:
        """See `Mailbox.receive`."""
        last = self._store.add("count", 0)
        self._missing.update(range(self._last + 1, last + 1))
        self._last = last
        messages = []
        for number in sorted(self._missing):
            if self._store.check([str(number)]):  # or its sender has a number, and has not set the key yet
                messages.append(bytes(self._store.get(str(number))))
                self._store.delete_key(str(number))
                self._missing.discard(number)
        return messages

    def close(self) -> None:
        """See `Mailbox.close`."""


class MessageServer(SignedServer):
    """Keeps the messages that are PUT."""

    def __init__(self, address: str, key: bytes) -> None:
        self.messages: list[bytes] = []
        super().__init__((address, 0), MessageHandler, key)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class MessageHandler(SignedHandler):
    """Handles the requests of one connection to a MessageServer."""

    server: MessageServer

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Keep a message."""
        if (method, path) != ("PUT", "/message"):
            return 404, b""
        self.server.messages.append(body)
        return 200, b""


class HorovodMailbox:
    """Messages over HTTP to rank 0, signed with the launch's secret, or with one that rank 0 draws.

    Rank 0's address travels in a broadcast that is started here, on all ranks alike, and read when it has arrived.
    """

    def __init__(self, horovod: Any, number: int) -> None:
        self.rank, self.size = horovod.rank(), horovod.size()
        self._horovod, self._server = horovod, None
        announcement = b""
        if self.rank == 0:
            secret = os.environ.get(SECRET) or new_secret()
            self._server = MessageServer(choose_address(horovod), secret.encode())
            drawn = "" if SECRET in os.environ else secret
            announcement = " ".join(map(str, [*self._server.server_address[:2], drawn])).encode()
        import torch

        buffer = torch.frombuffer(bytearray(announcement.ljust(ADDRESS_BYTES)), dtype=torch.uint8)
        self._handle = horovod.broadcast_async_(buffer, 0, name=f"hvdtrain.diagnose.{number}")
        self._client: SignedClient | None = None
        self._target = ("", 0)

    def is_ready(self) -> bool:
        """See `Mailbox.is_ready`."""
        if self._client is None and self._horovod.poll(self._handle):
            text = bytes(self._horovod.synchronize(self._handle).numpy()).decode()
            address, port, *drawn = text.split()
            self._client = SignedClient(drawn[0].encode() if drawn else read_key())
            self._target = (address, int(port))
        return self._client is not None

    def send(self, message: bytes) -> None:
        """See `Mailbox.send`."""
        assert self._client is not None
        try:
            self._client.request(*self._target, "PUT", "/message", message, DiagnosisLimits.send)
        except http.client.HTTPException as error:
            raise OSError(f"rank 0 at {self._target[0]} does not answer: {error}") from error

    def receive(self) -> list[bytes]:
        """See `Mailbox.receive`."""
        if self._server is None:
            return []
        count = len(self._server.messages)
        messages = self._server.messages[:count]
        del self._server.messages[:count]
        return messages

    def close(self) -> None:
        """See `Mailbox.close`."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def choose_address(horovod: Any) -> str:
    """Return the address of rank 0's host at which the other ranks reach it."""
    # The second is set on all ranks of `hvdtrain launch`; the first by horovodrun and srun only.
    interfaces = os.environ.get("HOROVOD_GLOO_IFACE") or os.environ.get("GLOO_SOCKET_IFNAME")
    if interfaces:
        return interface_address(interfaces.partition(",")[0])
    if horovod.local_size() == horovod.size():
        return "127.0.0.1"
    return resolve_address(socket.gethostname())
