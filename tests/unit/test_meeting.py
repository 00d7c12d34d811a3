"""The doctor's meeting: ranks come in, whatever strangers do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hvdtrain.doctor.lines import accept_session, join_session
from hvdtrain.doctor.meeting import Coordinator
from hvdtrain.doctor.peer import run_worker, wait_for_ticket
from hvdtrain.system import signed_http
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import Child


@pytest.fixture
def launcher() -> Iterator[Child]:
    """What seems to start the ranks."""
    with Child(["sleep", "100"]) as child:
        yield child


def where(room: Coordinator) -> tuple[str, int]:
    address, port = room.listener.getsockname()[:2]
    return str(address), int(port)


def start_rank(room: Coordinator, number: int, key: bytes | None = None) -> threading.Thread:
    rank = threading.Thread(
        target=run_worker, args=(where(room), key or room.secret.encode(), number, None), daemon=True
    )
    rank.start()
    return rank


def test_silent_connections_and_junk_keep_no_rank_out(launcher: Child) -> None:
    room = Coordinator(2, "127.0.0.1")
    junk = (b"\0" * 5000, b"\n", b"a b\n", b"{}\n", b"\xff" * 64 + b" x {}\n")
    with ThreadPoolExecutor(1) as thread:
        welcomed = thread.submit(room.accept_workers, launcher)
        strangers = [socket.create_connection(where(room), 10) for _ in range(500)]
        for stranger, line in zip(reversed(strangers), junk, strict=False):
            stranger.sendall(line)
        ranks = [start_rank(room, number) for number in range(2)]
        assert welcomed.result(50) == []
    assert {len(reply) for reply in room.run_commands({0: {"do": "burn"}, 1: {"do": "burn"}}, 30).values()} == {1}
    room.close()
    for rank in ranks:
        rank.join(10)
        assert not rank.is_alive()
    for stranger in strangers:
        stranger.close()


def test_who_does_not_know_the_secret_is_no_rank(launcher: Child) -> None:
    room = Coordinator(1, "127.0.0.1", DoctorLimits(worker_join=2.0))
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(run_worker, where(room), b"o" * 64, 0, None)
        assert room.accept_workers(launcher) == [0]
        room.close()
        with pytest.raises(OSError):
            other.result(10)


def test_a_first_line_that_was_recorded_lets_nobody_in(launcher: Child) -> None:
    room = Coordinator(1, "127.0.0.1", DoctorLimits(worker_join=1.0))
    lines, before = join_session(room.secret.encode(), b"n" * 64)  # of another connection
    with socket.create_connection(where(room), 10) as replay:
        replay.sendall(before + lines.sign_line({"rank": 0, "at": ["127.0.0.1", 9]}))
        assert room.accept_workers(launcher) == [0]
    room.close()


def test_a_rank_does_nothing_for_a_doctor_who_does_not_know_the_secret() -> None:
    for line in (b'{"do": "burn", "number": 1}\n', b"0" * 64 + b' {"do": "burn", "number": 1}\n'):
        with socket.create_server(("127.0.0.1", 0)) as doctor, ThreadPoolExecutor(1) as thread:
            rank = thread.submit(run_worker, doctor.getsockname()[:2], b"k" * 64, 0, None)
            connection, _ = doctor.accept()
            with connection:
                connection.sendall(b"n" * 64 + b"\n")
                assert connection.recv(4096)
                connection.sendall(line)
                with pytest.raises(ConnectionError, match="the doctor sends a line without this run's signature"):
                    rank.result(10)


def test_a_line_counts_once_in_its_place_and_direction() -> None:
    key, nonce = b"k" * 64, signed_http.new_secret()
    rank, before = join_session(key, f"{nonce}\n".encode())
    doctor, said = accept_session(key, nonce, before + rank.sign_line({"rank": 3}))
    assert said == {"rank": 3}
    first, second = doctor.sign_line({"do": "a"}), doctor.sign_line({"do": "b"})
    for wrong in (second, first.replace(b'"a"', b'"b"'), b"", rank.sign_line({"do": "a"})):
        fresh, before = join_session(key, nonce.encode())
        fresh.session = rank.session
        with pytest.raises(ValueError):
            fresh.verify_line(wrong)
    assert rank.verify_line(first) == {"do": "a"} and rank.verify_line(second) == {"do": "b"}
    with pytest.raises(ValueError):
        rank.verify_line(second)


def test_a_link_is_measured_with_the_rank_that_has_the_ticket() -> None:
    ticket = signed_http.new_secret().encode()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as door, ThreadPoolExecutor(1) as thread:
        strangers = [socket.create_connection(door.getsockname(), 10) for _ in range(50)]
        strangers[0].sendall(b"x" * 64)
        strangers[1].close()
        waiting: Any = thread.submit(wait_for_ticket, door, ticket, 30)
        with socket.create_connection(door.getsockname(), 10) as rank:
            rank.sendall(ticket[:10])
            time.sleep(0.05)
            rank.sendall(ticket[10:] + b"?")
            found = waiting.result(10)
            assert found is not None and found.getpeername() == rank.getsockname() and found.recv(1) == b"?"
            found.close()
        for stranger in strangers:
            stranger.close()
        assert wait_for_ticket(door, ticket, 0.2) is None


def test_a_meeting_is_on_its_address_only() -> None:
    room = Coordinator(1, "127.0.0.1")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", where(room)[1]), 5)
    room.close()
