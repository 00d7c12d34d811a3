"""A real supervisor with a worker that does not train, and a key-value server in the place of horovodrun's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.elastic.records import GONE, VERDICT, Verdict
from hvdtrain.elastic.store import FACT_SCOPE, KeyValueStore
from hvdtrain.system.signed_http import SECRET, SignedHandler, SignedServer
from tests.support.limits import stretch

KEY = "k" * 64
WORKER = """
import os, pathlib, sys
received = b"?"
pathlib.Path(sys.argv[1]).touch()
while received not in (b"d", b"s", b""):
    received = os.read(int(os.environ["HVDTRAIN_MESSAGES"]), 1)
sys.exit(75)
"""


class FactServer(SignedServer):
    """Keeps what is PUT, facts once, and lists keys by their beginning, as horovodrun's patched server does."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), FactHandler, KEY.encode())
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class FactHandler(SignedHandler):
    server: FactServer

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        values = self.server.values
        if path.startswith("/rank_and_size/"):
            return 200, b"0,1,0,1,0,1"
        if method == "PUT":
            if not path.startswith(f"/{FACT_SCOPE}/") or path not in values:
                values[path] = body
            return 200, b""
        if path.endswith("*"):
            scope = path[: path.index("/", 1) + 1]
            found = {
                key.removeprefix(scope): text.decode() for key, text in values.items() if key.startswith(path[:-1])
            }
            return 200, json.dumps(found).encode()
        return (200, values[path]) if path in values else (404, b"")


@pytest.fixture
def server() -> Iterator[FactServer]:
    server = FactServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def supervisor(server: FactServer, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A supervisor whose worker runs."""
    ranks = {
        f"HOROVOD_{name}{what}": str(number) for name in ("", "LOCAL_") for what, number in (("RANK", 0), ("SIZE", 1))
    }
    environ = os.environ | ranks | {SECRET: KEY, "HVDTRAIN_LEASE": "2", "HOROVOD_HOSTNAME": "a"}
    port = str(server.server_address[1])
    environ |= {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": port}
    code = "import os, sys; from hvdtrain.elastic.supervisor import Supervisor as S; "
    code += "sys.exit(S(sys.argv[1:], os.environ).supervise_worker())"
    command = [sys.executable, "-c", code, sys.executable, "-c", WORKER, str(tmp_path / "started")]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "started").exists)
    wait_for(lambda: any(key.startswith("/hvdtrain.pulses/") for key in list(server.values)))
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def store(server: FactServer, monkeypatch: pytest.MonkeyPatch) -> KeyValueStore:
    monkeypatch.setenv(SECRET, KEY)
    return KeyValueStore("127.0.0.1", int(server.server_address[1]))


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + stretch(seconds)
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_slot_that_is_to_leave_goes_in_the_next_round(
    supervisor: subprocess.Popen[str], store: KeyValueStore, number: int
) -> None:
    supervisor.send_signal(number)
    assert supervisor.wait(stretch(30)) == 75
    assert list(store.get_all(GONE).values()) == ["left"]
    assert store.get(VERDICT) is None


def test_a_stop_without_another_worker_ends_the_run(supervisor: subprocess.Popen[str], store: KeyValueStore) -> None:
    supervisor.send_signal(signal.SIGUSR1)
    assert supervisor.wait(stretch(30)) == 75
    assert store.get_all(GONE)


def test_the_end_of_the_run_is_the_end_of_the_supervisor(
    supervisor: subprocess.Popen[str], store: KeyValueStore
) -> None:
    store.put_if_absent(VERDICT, Verdict(3, "an error"))
    assert supervisor.wait(stretch(30)) == 3


def test_the_worker_saves_and_ends_when_horovodrun_is_gone(
    supervisor: subprocess.Popen[str], server: FactServer
) -> None:
    server.shutdown()
    server.server_close()
    assert supervisor.wait(stretch(30)) == 75
