"""Signed HTTP between the processes of a run, and what it answers to strangers."""

from __future__ import annotations

import ast
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hvdtrain.comm.rendezvous import RendezvousHandler, RendezvousServer
from hvdtrain.system import signed_http
from hvdtrain.system.signed_http import HEADER, MOST_STRANGERS, WINDOW, NotSigned, SignedClient, SignedServer

KEY, OTHER = b"k" * 64, b"o" * 64


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    served = RendezvousServer("127.0.0.1", {"a:0": "0,2,0,1,0,2"}, key=KEY)
    yield served
    served.stop_serving()


def ask(server: RendezvousServer, client: SignedClient, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    return client.request("127.0.0.1", server.port, method, path, body, timeout=10)


def send_raw(server: RendezvousServer, data: bytes) -> bytes:
    """All that the server answers to some bytes."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def recorded_put(server: RendezvousServer, client: SignedClient, body: bytes) -> bytes:
    """The bytes of a signed request, as somebody on the network sees them."""
    number, digest = next(client.numbers), signed_http.hash_body(body)
    address = f"127.0.0.1:{server.port}"
    mac = signed_http.authenticate(client.key, "request", "PUT", "/s/k", address, client.name, number, digest)
    signature = f"{HEADER}: {client.name} {number} {digest} {mac}"
    return f"PUT /s/k HTTP/1.0\r\nContent-Length: {len(body)}\r\n{signature}\r\n\r\n".encode() + body


def test_values_are_kept_and_waited_for(server: RendezvousServer) -> None:
    client = SignedClient(KEY)
    assert ask(server, client, "PUT", "/global/0", b"where") == (200, b"")
    assert ask(server, client, "GET", "/global/0") == (200, b"where")
    assert ask(server, client, "GET", "/rank_and_size/a:0") == (200, b"0,2,0,1,0,2")
    assert ask(server, client, "GET", "/global/1") == (404, b"")
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask, server, client, "GET", "/global/2")
        time.sleep(0.1)  # of WAIT, which is 1 s
        ask(server, client, "PUT", "/global/2", b"late")
        assert asked.result(10) == (200, b"late")
    assert ask(server, client, "DELETE", "/global/0") == (200, b"")
    assert ask(server, client, "GET", "/global/0") == (404, b"")
    assert ask(server, client, "GET", "/global/2") == (200, b"late")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_who_does_not_know_the_secret_gets_401_and_changes_nothing(server: RendezvousServer, method: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, "/rank_and_size/a:0", b"x" if method == "PUT" else None)
    answer = connection.getresponse()
    assert (answer.status, answer.read(), answer.headers[HEADER]) == (401, b"", None)
    with pytest.raises(NotSigned, match=f"answers 401 to {method} /rank_and_size/a:0 without this run's signature"):
        ask(server, SignedClient(OTHER), method, "/rank_and_size/a:0")
    assert server.values == {"/rank_and_size/a:0": b"0,2,0,1,0,2"}


def test_other_methods_get_405(server: RendezvousServer) -> None:
    for method in ("HEAD", "POST", "OPTIONS", "PATCH", "TRACE"):
        assert send_raw(server, f"{method} / HTTP/1.0\r\n\r\n".encode()).startswith(b"HTTP/1.0 405 ")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 99999999999", 413),
        (b"Content-Length: 16777217", 413),
        (b"Content-Length: " + b"9" * 5000, 413),
        (b"Content-Length: -1", 400),
        (b"Content-Length: \xb2", 400),
        (b"Transfer-Encoding: chunked", 400),
        (b"Hvdtrain-Signature: a b c d", 401),
        (b"Hvdtrain-Signature: a 1 c", 401),
        (b"Hvdtrain-Signature: \xff\xfe 1 \xff \xff", 401),
        (b"X: " + b"y" * 70000, 431),
        (b"\r\n".join(b"X%d: y" % number for number in range(200)), 431),
    ],
)
def test_junk_is_refused_before_its_body_is_read(server: RendezvousServer, head: bytes, status: int) -> None:
    assert send_raw(server, b"PUT /s/k HTTP/1.0\r\n" + head + b"\r\n\r\n").startswith(f"HTTP/1.0 {status} ".encode())
    assert "/s/k" not in server.values


def test_a_request_that_comes_a_second_time_is_refused(server: RendezvousServer) -> None:
    client = SignedClient(KEY)
    first = recorded_put(server, client, b"old")
    assert send_raw(server, first).startswith(b"HTTP/1.0 200 ")
    ask(server, client, "PUT", "/s/k", b"new")
    assert send_raw(server, first).startswith(b"HTTP/1.0 401 ")
    assert server.values["/s/k"] == b"new"


def test_a_request_does_nothing_at_another_server_and_with_another_body_method_or_path(
    server: RendezvousServer,
) -> None:
    def is_refused(data: bytes) -> bool:
        return send_raw(server, data).startswith(b"HTTP/1.0 401 ")

    other = RendezvousServer("127.0.0.1", {}, key=KEY)
    try:
        assert is_refused(recorded_put(other, SignedClient(KEY), b"x"))
    finally:
        other.stop_serving()
    good = recorded_put(server, SignedClient(KEY), b"good")
    for old, new in ((b"good", b"evil"), (b"PUT", b"GET"), (b"/s/k", b"/s/j"), (b" 1 ", b" 2 ")):
        assert is_refused(good.replace(old, new, 1) if old != b"good" else good[:-4] + new)
    assert not any(path.startswith("/s/") for path in server.values)


def test_a_client_takes_no_answer_from_a_server_without_the_secret() -> None:
    for reply in (b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"HTTP/1.0 404 no\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as stranger, ThreadPoolExecutor(1) as thread:
            asked = thread.submit(SignedClient(KEY).request, *stranger.getsockname()[:2], "GET", "/s/k", timeout=10)
            connection, _ = stranger.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)
            with pytest.raises(NotSigned, match="without this run's signature"):
                asked.result(10)


def test_an_answer_to_one_request_is_none_to_another(server: RendezvousServer) -> None:
    client = SignedClient(KEY)
    ask(server, client, "PUT", "/s/a", b"a")
    mac = signed_http.authenticate(KEY, "answer", "m" * 64, 200, signed_http.hash_body(b"a"))
    assert mac != signed_http.authenticate(KEY, "answer", "n" * 64, 200, signed_http.hash_body(b"a"))
    assert mac != signed_http.authenticate(KEY, "answer", "m" * 64, 404, signed_http.hash_body(b"a"))


def test_numbers_of_one_client_may_come_out_of_order_but_only_once(server: RendezvousServer) -> None:
    order = [5, 3, 4, 1, WINDOW + 3, 2, 6, 2 * WINDOW + 10]
    assert [server.is_new("c", number) for number in order] == [True, True, True, True, True, False, True, True]
    assert not any(server.is_new("c", number) for number in order)
    assert server.is_new("d", 5)
    assert not server.is_new("d", -(10**30)) and server.is_new("d", 10**30)


def test_silent_connections_keep_nobody_out(server: RendezvousServer) -> None:
    """More of them than there is room for, with half a request each: the first ones are closed for the later ones."""
    silent = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(MOST_STRANGERS + 150)]
    try:
        for connection in silent:
            connection.sendall(b"GET /")
        begin = time.monotonic()
        assert ask(server, SignedClient(KEY), "GET", "/rank_and_size/a:0") == (200, b"0,2,0,1,0,2")
        assert time.monotonic() - begin < 10
        assert len(server.strangers) <= MOST_STRANGERS
        silent[0].settimeout(10)
        assert silent[0].recv(1) == b""
    finally:
        for connection in silent:
            connection.close()


def test_a_silent_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch, server: RendezvousServer) -> None:
    monkeypatch.setattr(RendezvousHandler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        assert connection.recv(1) == b""


def test_a_server_listens_on_its_address_only(server: RendezvousServer) -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", server.port), 5)


def test_no_proxy_is_asked(server: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(server, SignedClient(KEY), "GET", "/rank_and_size/a:0")[0] == 200


def test_strangers_write_nothing_to_the_output(server: RendezvousServer, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends by a reset
        connection.sendall(b"PUT /s/k HTTP/1.0\r\nContent-Length: 5\r\n\r\n")
    send_raw(server, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


def test_a_secret_that_is_missing_or_short_is_named() -> None:
    for environ, length in (({}, 0), ({"HVDTRAIN_SECRET": "hunter2"}, 7)):
        with pytest.raises(NotSigned, match=f"HVDTRAIN_SECRET has {length} characters; expected at least 32"):
            signed_http.read_key(environ)
    environ: dict[str, str] = {}
    signed_http.give_secret(environ)
    given = dict(environ)
    signed_http.give_secret(environ)
    assert environ == given and len(signed_http.read_key(environ)) == 64


def test_requests_of_many_threads_are_all_answered(server: RendezvousServer) -> None:
    client = SignedClient(KEY)
    with ThreadPoolExecutor(16) as threads:
        done = list(threads.map(lambda n: ask(server, client, "PUT", f"/s/{n}", b"x"), range(200)))
    assert done == [(200, b"")] * 200 and threading.active_count() < 100
    assert isinstance(server, SignedServer)


def code_without_comments(text: str) -> str:
    """The syntax tree of Python code, without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def test_horovods_copy_is_this_code() -> None:
    """Its server and clients sign as ours do. Only words may differ: other words would make another Horovod."""
    source = Path(signed_http.__file__)
    patch = (source.parents[1] / "native/patches/20-signed-http.patch").read_text()
    hunk = patch.partition("+++ b/horovod/runner/http/signing.py\n")[2].partition("\ndiff ")[0].splitlines()[1:]
    copy = "\n".join(line[1:] for line in hunk if line.startswith("+"))
    assert code_without_comments(copy) == code_without_comments(source.read_text())
