"""The network test's coordinator and workers: they find each other, whatever others send."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hvdtrain.doctor.network_test.coordinator import Coordinator
from hvdtrain.doctor.network_test.links import wait_for_ticket
from hvdtrain.doctor.network_test.messages import (
    CpuReply,
    Hello,
    MeasureCpu,
    encode_message,
    parse_command,
    parse_reply,
)
from hvdtrain.doctor.network_test.signed_lines import accept_session, join_session
from hvdtrain.doctor.network_test.worker import run_worker
from hvdtrain.system import signed_http
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import Child
from hvdtrain.system.records import encode_record
from tests.support.limits import stretch


@pytest.fixture
def launcher() -> Iterator[Child]:
    """What seems to start the ranks."""
    with Child(["sleep", "100"]) as child:
        yield child


def where(coordinator: Coordinator) -> tuple[str, int]:
    address, port = coordinator.listener.getsockname()[:2]
    return str(address), int(port)


def start_rank(coordinator: Coordinator, number: int, key: bytes | None = None) -> threading.Thread:
    rank = threading.Thread(
        target=run_worker, args=(where(coordinator), key or coordinator.secret.encode(), number, None), daemon=True
    )
    rank.start()
    return rank


def test_silent_connections_and_junk_keep_no_worker_out(launcher: Child) -> None:
    coordinator = Coordinator(2, "127.0.0.1")
    junk = (b"\0" * 5000, b"\n", b"a b\n", b"{}\n", b"\xff" * 64 + b" x {}\n")
    with ThreadPoolExecutor(1) as thread:
        welcomed = thread.submit(coordinator.accept_workers, launcher)
        strangers = [socket.create_connection(where(coordinator), 10) for _ in range(500)]
        for stranger, line in zip(reversed(strangers), junk, strict=False):
            stranger.sendall(line)
        ranks = [start_rank(coordinator, number) for number in range(2)]
        assert welcomed.result(50) == []
    replies = coordinator.run_commands({0: MeasureCpu(), 1: MeasureCpu()}, 30)
    assert all(isinstance(reply, CpuReply) for reply in replies.values())
    coordinator.end_test()
    for rank in ranks:
        rank.join(stretch(10))
        assert not rank.is_alive()
    for stranger in strangers:
        stranger.close()


def test_who_does_not_know_the_secret_is_not_a_worker(launcher: Child) -> None:
    coordinator = Coordinator(1, "127.0.0.1", DoctorLimits(worker_join=2.0))
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(run_worker, where(coordinator), b"o" * 64, 0, None)
        assert coordinator.accept_workers(launcher) == [0]
        coordinator.end_test()
        with pytest.raises(OSError):
            other.result(10)


def test_a_first_line_that_was_recorded_lets_nobody_in(launcher: Child) -> None:
    coordinator = Coordinator(1, "127.0.0.1", DoctorLimits(worker_join=1.0))
    lines, before = join_session(coordinator.secret.encode(), b"n" * 64)  # of another connection
    with socket.create_connection(where(coordinator), 10) as replay:
        replay.sendall(before + lines.sign_line(encode_record(Hello(0, ("127.0.0.1", 9)))))
        assert coordinator.accept_workers(launcher) == [0]
    coordinator.end_test()


def test_a_worker_does_nothing_for_a_coordinator_that_does_not_know_the_secret() -> None:
    command = json.dumps(encode_message(1, MeasureCpu())).encode()
    for line in (command + b"\n", b"0" * 64 + b" " + command + b"\n"):
        with socket.create_server(("127.0.0.1", 0)) as doctor, ThreadPoolExecutor(1) as thread:
            rank = thread.submit(run_worker, doctor.getsockname()[:2], b"k" * 64, 0, None)
            connection, _ = doctor.accept()
            with connection:
                connection.sendall(b"n" * 64 + b"\n")
                assert connection.recv(4096)
                connection.sendall(line)
                with pytest.raises(ConnectionError, match="the coordinator sends a line without this run's signature"):
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


def test_a_link_is_measured_with_the_worker_that_has_the_ticket() -> None:
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


def test_the_coordinator_listens_on_its_address_only() -> None:
    coordinator = Coordinator(1, "127.0.0.1")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", where(coordinator)[1]), 5)
    coordinator.end_test()


def test_messages_of_another_kind_or_type_are_refused() -> None:
    assert parse_command(encode_message(3, MeasureCpu())) == (3, MeasureCpu())
    good = encode_message(3, CpuReply(1.5))
    assert parse_reply(good) == (3, CpuReply(1.5))
    for wrong in (
        *({}, [], None, good | {"kind": "MeasureCpu"}, good | {"number": "3"}, good | {"content": {}}),
        *(good | {"content": {"slowdown": "1.5"}}, good | {"kind": 3}),
    ):
        with pytest.raises(ValueError):
            parse_reply(wrong)
