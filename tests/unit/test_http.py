"""HTTP requests go straight to their server, within their time limit."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from hvdtrain.system import signed_http
from hvdtrain.system.http import InvalidHttpResponse, request_signed, request_url


@contextmanager
def serving(answer: Callable[[socket.socket, bytes], None]) -> Iterator[tuple[str, int]]:
    """A server that passes each connection and the request that came on it to `answer`; yields address and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    answer(connection, connection.recv(65536))

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[:2]
        listener.shutdown(socket.SHUT_RDWR)


def sending(text: str) -> Callable[[socket.socket, bytes], None]:
    return lambda connection, request: connection.sendall(text.encode())


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(sending("HTTP/1.1 200 OK\r\nETag: 7\r\nContent-Length: 2\r\n\r\nhi")) as (address, port):
        answer = request_url(f"http://{address}:{port}/x", timeout=5.0)
    assert (answer.status, answer.text, answer.headers["ETag"]) == (200, "hi", "7")


def test_method_and_headers_are_sent() -> None:
    seen = []

    def answer(connection: socket.socket, request: bytes) -> None:
        seen.append(request.decode())
        sending("HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")(connection, request)

    with serving(answer) as (address, port):
        assert request_url(f"http://{address}:{port}/t", method="PUT", headers={"X-A": "1"}, timeout=5.0).status == 404
    assert seen[0].startswith("PUT /t HTTP/1.1\r\n") and "X-A: 1\r\n" in seen[0]


def test_redirects_are_not_followed() -> None:
    with serving(sending("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n")) as where:
        assert request_url(f"http://{where[0]}:{where[1]}/", timeout=5.0).status == 302


def test_silent_server_times_out() -> None:
    with serving(lambda connection, request: time.sleep(1.0)) as (address, port), pytest.raises(TimeoutError):
        request_url(f"http://{address}:{port}/", timeout=0.2)


def test_answer_that_trickles_in_is_given_up() -> None:
    def trickle(connection: socket.socket, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            for _ in range(50):
                connection.sendall(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    with serving(trickle) as (address, port):
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            request_url(f"http://{address}:{port}/", timeout=0.5)
        assert time.monotonic() - begin < 5


def test_unreachable_server_raises_the_systems_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        request_url(f"http://127.0.0.1:{port}/", timeout=5.0)


def test_server_that_does_not_speak_http_is_an_os_error_too() -> None:
    with serving(sending("SSH-2.0-OpenSSH\r\n")) as (address, port):
        with pytest.raises(InvalidHttpResponse):
            request_url(f"http://{address}:{port}/", timeout=5.0)
        with pytest.raises(InvalidHttpResponse):
            client = signed_http.SignedClient(b"k" * 64)
            request_signed(client, (address, port), "GET", "/", timeout=5.0)


def test_server_without_the_secret_is_refused() -> None:
    answer = sending("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with serving(answer) as server, pytest.raises(signed_http.NotSigned):
        request_signed(signed_http.SignedClient(b"k" * 64), server, "GET", "/", timeout=5.0)
