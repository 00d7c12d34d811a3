"""Stores in which ranks find each other: what one meeting left there must not reach the next one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
from horovod.runner.http.http_server import RendezvousServer as HorovodsServer

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.system.http import request_signed
from hvdtrain.system.signed_http import SECRET, SignedClient, new_secret, read_key


@dataclass
class Store:
    """A server of one of the two kinds, and the ranks' way to it."""

    port: int
    client: SignedClient

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        return request_signed(self.client, ("127.0.0.1", self.port), method, path, body, timeout=10.0)


@pytest.fixture(params=["horovodrun's", "hvdtrain's"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv(SECRET, new_secret())
    monkeypatch.setattr("hvdtrain.comm.rendezvous.GET_WAIT_SECONDS", 0)
    client = SignedClient(read_key())
    if request.param == "hvdtrain's":
        own = RendezvousServer("127.0.0.1", {})
        yield Store(own.port, client)
        own.stop_serving()
        return
    server = HorovodsServer()
    port = server.start(address="127.0.0.1")
    server.init(get_host_assignments([HostInfo("a", 2)], 2))
    yield Store(port, client)
    server.stop()
    server._httpd.server_close()


def test_addresses_are_gone_once_all_ranks_have_met(store: Store) -> None:
    for rank in "01":
        store.request("PUT", f"/global/{rank}", b"address")
    assert store.request("GET", "/global/0") == (200, b"address")
    for rank in "01":
        store.request("DELETE", f"/global/{rank}")
    assert [store.request("GET", f"/global/{rank}")[0] for rank in "01"] == [404, 404]


def test_addresses_are_gone_although_one_rank_is_ahead_of_the_other(store: Store) -> None:
    for scope in ("global", "local_a"):
        for rank in "01":
            store.request("PUT", f"/{scope}/{rank}", b"address")
    for path in ("/global/0", "/local_a/0", "/global/1", "/local_a/1"):
        store.request("DELETE", path)
    paths = [f"/{scope}/{rank}" for scope in ("global", "local_a") for rank in "01"]
    assert [store.request("GET", path)[0] for path in paths] == [404] * 4
