"""Messages between processes of a run over sockets of their own, whatever has started them: as `MpiMessages`.

    connecting process -> listener     nonce
    listener -> connecting process     nonce, HMAC(secret, listen ADDRESS:PORT NONCES)
    connecting process -> listener     HMAC(secret, connect ADDRESS:PORT NONCES RANK), RANK
    then both, as often as they like   two lengths, a value as JSON, an array of bytes

A listener listens on one interface. Nobody gets farther who does not know the secret, which is never sent: nonces are
new in each connection, and ADDRESS:PORT makes what was recorded useless for another listener.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import select
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.comm.lazy_horovod import load_peers_lost
from hvdtrain.comm.mailbox import choose_address
from hvdtrain.comm.signed_store import agree_on_key
from hvdtrain.comm.world import World, connections
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import RendezvousLimits
from hvdtrain.system.signed_http import (
    READ_SECONDS,
    NotSigned,
    SignedHandler,
    SignedServer,
    authenticate,
    new_secret,
)

LENGTHS = struct.Struct("!QQ")  # of a frame's JSON and of its array
WORD = 64  # characters of a nonce, and of an HMAC
RANK = 8  # digits of a rank
LOOK_SECONDS = 0.1  # between two looks while a message is waited for


class MessageListener(SignedServer):
    """Accepts the connections of processes that know the secret.

    Attributes:
        arrived: each connection, and the rank that its process says it is.
    """

    def __init__(self, address: str, key: bytes) -> None:
        """Start to listen at a port of its own. Raises OSError."""
        self.arrived = queue.SimpleQueue[tuple[int, socket.socket]]()
        self._accepted = set[socket.socket]()
        super().__init__((address, 0), Greeting, key)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def accept_peer(self, rank: int, connection: socket.socket) -> None:
        """Keep a connection open, whose process has shown that it knows the secret."""
        self.forget_stranger(connection)
        self._accepted.add(connection)
        self.arrived.put((rank, connection))

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that was not accepted."""
        if request in self._accepted:
            self._accepted.remove(request)
        else:
            super().shutdown_request(request)

    def close(self) -> None:
        """Stop listening; connections that were accepted stay."""
        self.shutdown()
        self.server_close()


class Greeting(SignedHandler):
    """The listener's side of how a connection begins."""

    server: MessageListener

    def handle(self) -> None:
        """Accept the connection if the other side knows the secret."""
        connection, key = self.connection, self.server.key
        nonce = read_exactly(connection, WORD).decode("ascii", "replace")
        if not nonce.isalnum():
            return
        words = [format_address(connection.getsockname()), nonce, new_secret()]
        connection.sendall((words[-1] + authenticate(key, "listen", *words)).encode())
        mac, rank = read_exactly(connection, WORD), read_exactly(connection, RANK)
        right = authenticate(key, "connect", *words, rank.decode("ascii", "replace"))
        if hmac.compare_digest(mac, right.encode()):
            self.server.accept_peer(int(rank), connection)


def connect_peer(listener: tuple[str, int], key: bytes, rank: int) -> socket.socket:
    """Connect to a listener.

    Args:
        listener: its address and port.
        key: the secret.
        rank: of this process.

    Raises:
        NotSigned: it does not know the secret.
        OSError: it does not answer.
    """
    connection = socket.create_connection(listener, READ_SECONDS)
    try:
        words = [format_address(connection.getpeername()), new_secret()]
        connection.sendall(words[-1].encode())
        words.append(read_exactly(connection, WORD).decode("ascii", "replace"))
        right = authenticate(key, "listen", *words)
        if not hmac.compare_digest(read_exactly(connection, WORD), right.encode()):
            raise NotSigned(f"{words[0]} does not know the secret of this run")
        own = f"{rank:0{RANK}}"
        connection.sendall((authenticate(key, "connect", *words, own) + own).encode())
    except BaseException:
        connection.close()
        raise
    return connection


def format_address(address: tuple[Any, ...]) -> str:
    """Return an address and port as a word."""
    return f"{address[0]}:{address[1]}"


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """Return the next bytes. Raises OSError if the connection ends before."""
    data = bytearray(size)
    read_into(connection, memoryview(data))
    return bytes(data)


def read_into(connection: socket.socket, view: memoryview) -> None:
    """Fill memory with the next bytes. Raises OSError if the connection ends before."""
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionResetError("the connection was closed")
        view = view[count:]


class SocketMessages:
    """Messages over sockets: see `hvdtrain.comm.messages.Messages`."""

    def __init__(self, look: Callable[[], object] = lambda: None) -> None:
        """Know nobody yet. look: called before each message is received, and often while one is waited for."""
        self.peers: dict[int, socket.socket] = {}
        self.is_closed = False
        self._look, self._selector = look, selectors.DefaultSelector()

    def add_peer(self, rank: int, connection: socket.socket) -> None:
        """Exchange messages with a process."""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peers[rank] = connection
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def break_connection(self, rank: int) -> None:
        """Let whoever waits for a process learn that it is lost. Any thread may call it."""
        if (connection := self.peers.get(rank)) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def remove_peer(self, rank: int) -> None:
        """Close the connection with a process."""
        connection = self.peers.pop(rank)
        self._selector.unregister(connection)
        connection.close()

    def look_around(self) -> None:
        """Do what is to be done while nothing comes."""
        self._look()

    def send(self, to: int, value: object, body: NDArray[np.uint8] | None = None) -> None:
        """Send a message, and return when the arrays may be changed. Raises PeersLost."""
        head, size = json.dumps(value).encode(), 0 if body is None else body.nbytes
        try:
            self.peers[to].sendall(LENGTHS.pack(len(head), size) + head)
            if body is not None and size:
                self.peers[to].sendall(body.data)
        except OSError as error:
            raise load_peers_lost()(f"rank {to} cannot be reached any more: {error}") from error

    def receive(self, body: NDArray[np.uint8] | None = None, source: int | None = None) -> tuple[int, Any]:
        """Wait for a message; return who has sent it, and its value. Raises PeersLost if a process has ended."""
        rank = self.wait_for_message(source)
        connection = self.peers[rank]
        try:
            length, size = LENGTHS.unpack(read_exactly(connection, LENGTHS.size))
            value = json.loads(read_exactly(connection, length))
            if size:
                assert body is not None and body.nbytes == size, f"{size} bytes, which are not expected"
                read_into(connection, body.data)
        except OSError as error:
            raise load_peers_lost()(f"rank {rank} has left: {error}") from error
        return rank, value

    def wait_for_message(self, source: int | None = None) -> int:
        """Wait for a message, or the end of a connection; return whose: of several, whose turn it is in the system."""
        self.look_around()
        if source is not None:
            waited_for = select.poll()
            waited_for.register(self.peers[source], select.POLLIN)
            while not waited_for.poll(1000 * LOOK_SECONDS):
                self.look_around()
            return source
        while not (ready := self._selector.select(LOOK_SECONDS)):
            self.look_around()
        return int(ready[0][0].data)

    def close(self) -> None:
        """Close all connections; what was sent still arrives."""
        connections.discard(self)
        self.is_closed = True
        self._selector.close()
        for connection in self.peers.values():
            connection.close()
        self.peers.clear()


def connect_sockets(world: World, listeners: int) -> SocketMessages:
    """Connect the first `listeners` ranks with all others; all ranks of Horovod's world call it.

    Raises:
        RunError: a rank does not come in time.
    """
    key, limit = agree_on_key(), RendezvousLimits.from_environment().server_start
    messages = SocketMessages()
    own = MessageListener(choose_address(hvd), key) if world.rank < listeners else None
    addresses = collectives.gather_json(own and own.server_address[:2], "messages.listeners")
    for rank in range(min(listeners, world.rank)):
        messages.add_peer(rank, connect_peer(tuple(addresses[rank]), key, world.rank))
    if own is not None:
        for _ in range(world.rank + 1, world.size):
            try:
                messages.add_peer(*own.arrived.get(timeout=limit))
            except queue.Empty:
                raise RunError(f"a rank has not connected with rank {world.rank} within {limit:.0f} s") from None
        own.close()
    return messages
