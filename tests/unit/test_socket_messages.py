"""Messages over sockets: order, arrays, lost processes, and who gets no connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hvdtrain.comm.crew_messages import CrewMessages
from hvdtrain.comm.lazy_horovod import load_peers_lost
from hvdtrain.comm.socket_messages import RANK, WORD, MessageListener, SocketMessages, connect_peer
from hvdtrain.system.signed_http import NotSigned, authenticate
from tests.support.limits import stretch

KEY, OTHER = b"k" * 64, b"x" * 64


@pytest.fixture
def listener() -> Iterator[MessageListener]:
    listener = MessageListener("127.0.0.1", KEY)
    yield listener
    listener.close()


def where(listener: MessageListener) -> tuple[str, int]:
    return str(listener.server_address[0]), int(listener.server_address[1])


@pytest.fixture
def ends(listener: MessageListener) -> Iterator[tuple[SocketMessages, SocketMessages, SocketMessages]]:
    """Rank 0, and ranks 1 and 2, which are connected with it."""
    zero, one, two = SocketMessages(), SocketMessages(), SocketMessages()
    for rank, other in enumerate((one, two), 1):
        other.add_peer(0, connect_peer(where(listener), KEY, rank))
        zero.add_peer(*listener.arrived.get(timeout=stretch(10)))
    yield zero, one, two
    for messages in (zero, one, two):
        messages.close()


def test_messages_arrive_in_their_order_with_arrays_of_any_size(
    ends: tuple[SocketMessages, SocketMessages, SocketMessages],
) -> None:
    zero, one, _ = ends
    large = np.arange(9_000_001).astype(np.uint8)  # more than a socket holds
    with ThreadPoolExecutor(1) as thread:
        sent = [thread.submit(one.send, 0, ["n", number], body) for number, body in enumerate((None, large, large[:0]))]
        into = np.zeros_like(large)
        assert [zero.receive(into) for _ in range(3)] == [(1, ["n", 0]), (1, ["n", 1]), (1, ["n", 2])]
        assert [one.result(stretch(10)) for one in sent] == [None] * 3
    assert np.array_equal(into, large)


def test_whoever_sends_first_is_received_first_unless_another_is_asked_for(
    ends: tuple[SocketMessages, SocketMessages, SocketMessages],
) -> None:
    zero, one, two = ends
    two.send(0, "b")
    assert zero.receive() == (2, "b")
    one.send(0, "a")
    two.send(0, "c")
    assert zero.receive(source=2) == (2, "c")
    assert zero.receive() == (1, "a")


def test_a_process_that_has_ended_is_a_lost_peer(ends: tuple[SocketMessages, SocketMessages, SocketMessages]) -> None:
    zero, one, two = ends
    one.send(0, "last")
    one.close()
    assert zero.receive() == (1, "last")
    for source in (None, 1):
        with pytest.raises(load_peers_lost(), match="rank 1 has left"):
            zero.receive(source=source)
    two.send(0, "still there")
    assert zero.receive(source=2) == (2, "still there")


def test_a_crew_changes_while_its_server_waits(listener: MessageListener) -> None:
    looks = list[int]()
    server = CrewMessages(listener, lambda: looks.append(1))
    one, two = SocketMessages(), SocketMessages()
    one.add_peer(0, connect_peer(where(listener), KEY, 0))
    one.send(0, ["joined", "a"])
    assert server.receive() == (1, ["joined", "a"])
    two.add_peer(0, connect_peer(where(listener), KEY, 0))
    two.send(0, ["joined", "b"])
    assert server.receive() == (2, ["joined", "b"])
    one.close()
    assert server.receive() == (1, ["lost"])
    server.send(1, "nobody hears it")
    one = SocketMessages()
    one.add_peer(0, connect_peer(where(listener), KEY, 0))
    one.send(0, ["joined", "c"])
    assert server.receive() == (1, ["joined", "c"])
    server.send(1, "again")
    assert one.receive(source=0) == (0, "again")
    assert looks
    server.close()
    with pytest.raises(load_peers_lost(), match="rank 0 has left"):
        two.receive(source=0)
    with pytest.raises(OSError):
        connect_peer(where(listener), KEY, 0)
    for messages in (one, two):
        messages.close()


def test_nobody_gets_a_connection_without_the_secret(listener: MessageListener) -> None:
    with pytest.raises(NotSigned, match="does not know the secret"):
        connect_peer(where(listener), OTHER, 1)
    words = [":".join(map(str, where(listener))), "a" * WORD]
    for key, nonce in ((OTHER, "a" * WORD), (KEY, "b" * WORD)):  # another secret; an answer to another nonce
        with socket.create_connection(where(listener), stretch(10)) as stranger:
            stranger.sendall(nonce.encode())
            answer = stranger.makefile("rb").read(2 * WORD).decode()
            mac = authenticate(key, "connect", *words, answer[:WORD], "1".zfill(RANK))
            stranger.sendall((mac + "1".zfill(RANK)).encode())
            assert stranger.recv(1) == b""
    with socket.create_connection(where(listener), stretch(10)) as stranger:
        stranger.sendall(b" " * WORD)
        assert stranger.recv(1) == b""
    assert listener.arrived.empty()


def test_a_listener_without_the_secret_gets_no_messages() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def answer() -> None:
            connection, _ = stranger.accept()
            with connection:
                connection.recv(WORD)
                connection.sendall(b"0" * 2 * WORD)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(NotSigned):
            connect_peer(stranger.getsockname(), KEY, 1)
        thread.join()
