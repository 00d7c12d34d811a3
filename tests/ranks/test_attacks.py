"""An attacker against real runs: each ends with the numbers of an undisturbed one, and executes nothing for him."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from hvdtrain.native import installed
from hvdtrain.system.signed_http import SECRET
from tests.ranks.elastic import RECIPE, ElasticJob, losses
from tests.ranks.harness import BIN, HVDTRAIN, Job, skip_or_fail, train, wait_for_step
from tests.support.attacker import Recorder, SilentConnections, attack, listeners, send
from tests.support.limits import stretch

# Each attack takes its time, more of it on a machine that is busy.
pytestmark = pytest.mark.timeout(300)

FORGING = str(Path(__file__).with_name("forging_recipe.py"))
FAST = ["--threads", "1", "--log-every", "1", "--epochs", "2"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nobody disturbs, on one rank."""
    folder = tmp_path_factory.mktemp("reference")
    train("alone", 1, RECIPE, folder / "run", "--pause", "0", *FAST)
    return losses(folder / "run")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    if os.geteuid() != 0:
        skip_or_fail("who records the network needs root")
    recorder = Recorder()
    yield recorder
    recorder.close()


def check_undisturbed(run_dir: Path, reference: list[float]) -> None:
    found = losses(run_dir)
    assert len(found) == len(reference)
    np.testing.assert_allclose(found, reference, rtol=1e-5)


def check_addresses(job: Job) -> None:
    """Nothing of the run listens on another interface than the loopback."""
    others = {where for where in listeners(job.processes()) if not where[0].startswith("127.")}
    assert not others, others


def command_lines(processes: Iterable[psutil.Process]) -> list[str]:
    """The command lines of those of the processes that still live."""
    lines = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            lines.append(" ".join(process.cmdline()))
    return lines


def shown() -> str:
    """All command lines on this host, as `ps` shows them."""
    return "\n".join(command_lines(psutil.process_iter()))


def secrets_of(job: Job) -> set[str]:
    found = set()
    for process in job.processes():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found.add(process.environ().get(SECRET, ""))
    return found - {""}


@pytest.mark.slow
def test_static_run_survives_forged_messages_and_replayed_requests(
    tmp_path: Path, reference: list[float], recorder: Recorder
) -> None:
    """Forged messages in the output of a rank, everything bad to all ports, and all requests once more."""
    touched, run_dir = tmp_path / "touched", tmp_path / "run"
    with subprocess.Popen(["sleep", "300"]) as victim:
        options = ["--pause", "0.3", "--victim", str(victim.pid), "--touched", str(touched), *FAST]
        with Job([*HVDTRAIN, "launch", "-np", "2", FORGING, "--run-dir", str(run_dir), *options]) as job:
            wait_for_step(run_dir, 2)
            secrets, text = secrets_of(job), shown()
            assert len(secrets) == 1 and not any(secret in text for secret in secrets)
            assert not [line for line in command_lines(job.processes()) if SECRET in line]
            check_addresses(job)
            ports = {port for _, port in listeners(job.processes())}  # other tests have theirs on this interface
            with SilentConnections(listeners(job.processes()), 30):
                assert attack(job.processes(), touched) == []
                seen = {port: requests for port, requests in recorder.close().items() if port in ports}
                assert seen
                for port, requests in seen.items():
                    for data in requests[:50]:
                        assert send(("127.0.0.1", port), data, 0.5)[:12] in (b"", b"HTTP/1.0 401")
            done = job.finish()
        alive = victim.poll() is None
        victim.kill()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert alive and not touched.exists()
    assert '[0] ##hvdtrain {"kind": "started"' in done.stdout  # shown as the text that it is
    assert "forged" not in done.stderr
    check_undisturbed(run_dir, reference)


def test_elastic_run_keeps_its_secret_and_survives_attacks(
    tmp_path: Path, reference: list[float], recorder: Recorder
) -> None:
    touched = tmp_path / "touched"
    with ElasticJob(tmp_path, "localhost:2", "--pause", "0.3", "--epochs", "2", least=2, most=2) as job:
        job.step(3)
        secrets, text = secrets_of(job), shown()
        assert len(secrets) == 1 and not any(secret in text for secret in secrets)
        check_addresses(job)
        ports = {port for _, port in listeners(job.processes())}
        with job.held(), SilentConnections(listeners(job.processes()), 30):
            assert attack(job.processes(), touched) == []
            seen = {port: requests for port, requests in recorder.close().items() if port in ports}
            replayed = [(port, data) for port, requests in seen.items() for data in requests if data[:3] == b"PUT"]
            assert any(b"hvdtrain.pulses" in data for _, data in replayed)
            for port, data in replayed[:100]:
                assert send(("127.0.0.1", port), data, 0.5)[:12] in (b"", b"HTTP/1.0 401")
        before = job.done()
        job.kill(1)  # and a rank is replaced as ever
        job.world(2)
        job.more(1)
        assert job.done() > before
        job.end()
    assert not touched.exists()
    check_undisturbed(job.run_dir, reference)


STOCK = """
import os, sys, time
import torch
import horovod.torch as hvd

hvd.init()
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
state = hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0, sizes=[])


@hvd.elastic.run
def train(state):
    while 2 not in state.sizes:
        total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="sum")
        assert int(total) == hvd.size()
        state.batch += 1
        state.sizes = sorted({*state.sizes, hvd.size()})
        print("batch", state.batch, "of", hvd.size(), flush=True)
        state.commit()
        time.sleep(0.1)


train(state)
print("trained", hvd.rank(), state.sizes, flush=True)
"""


@pytest.mark.slow
def test_stock_horovod_script_grows_while_attacks_are_refused(tmp_path: Path) -> None:
    """hvd.elastic.run grows by a host while what CVE-2024-10190 sends, and more, is refused."""
    (tmp_path / "stock.py").write_text(STOCK)
    (tmp_path / "hosts").write_text("localhost:1\n")
    script = tmp_path / "discover.sh"
    script.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    script.chmod(0o755)
    output, touched = tmp_path / "output", tmp_path / "touched"
    line = [str(BIN / "horovodrun"), "--gloo", "-np", "1", "--min-np", "1", "--max-np", "2", "--network-interfaces"]
    line += ["lo", "--host-discovery-script", str(script), sys.executable, str(tmp_path / "stock.py")]
    with Job(line, output=output) as job:
        until = time.monotonic() + stretch(60)
        while "batch 3 of 1" not in output.read_text():
            assert time.monotonic() < until and job.process.poll() is None, output.read_text()
            time.sleep(0.1)
        assert len(secrets_of(job)) == 1 and secrets_of(job).pop() not in shown()
        check_addresses(job)
        with SilentConnections(listeners(job.processes()), 30):
            assert attack(job.processes(), touched) == []
            (tmp_path / "hosts").write_text("localhost:2\n")
            done = job.finish()
    said = output.read_text()
    assert done.returncode == 0, said
    assert "trained 0 [1, 2]" in said and "trained 1 [1, 2]" in said and not touched.exists()


def slurm_environment(rank: int, job: int, home: Path) -> dict[str, str]:
    """What Slurm tells a task of two on this host."""
    host = socket.gethostname()
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": host,
        "SLURMD_NODENAME": host,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "HOME": str(home),
    }


def test_srun_tasks_share_a_secret_by_file_and_refuse_an_impostor(tmp_path: Path, reference: list[float]) -> None:
    """Rank 0 leaves one in a file that only its user reads; somebody who has taken its port is not believed."""
    touched, run_dir = tmp_path / "touched", tmp_path / "run"
    train_line = [*HVDTRAIN, "train", RECIPE, "--run-dir", str(run_dir), "--pause", "0.6", *FAST]
    number = os.getpid()
    with Job(train_line, env=slurm_environment(1, number, tmp_path)) as second:
        time.sleep(1)
        with Job(train_line, env=slurm_environment(0, number, tmp_path)) as first:
            folder = tmp_path / ".hvdtrain"
            until = time.monotonic() + stretch(60)
            while not (left := list(folder.glob("secret-*"))):
                assert time.monotonic() < until
                time.sleep(0.01)
            assert left[0].stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
            wait_for_step(run_dir, 2)
            assert not list(folder.iterdir())  # all have met
            check_addresses(first)
            check_addresses(second)
            assert listeners(first.processes())  # the store; the other rank has nothing that listens any more
            processes = [*first.processes(), *second.processes()]
            with SilentConnections(listeners(processes), 30):
                assert attack(processes, touched) == []
            done = first.finish(), second.finish()
    assert [one.returncode for one in done] == [0, 0], f"{done[0].stderr}\n{done[1].stderr}"
    assert not touched.exists()
    check_undisturbed(run_dir, reference)


def test_horovods_servers_answer_nobody_else(tmp_path: Path) -> None:
    """The key-value server of horovod.run, on its address only; and what a rank says that is not JSON is refused."""
    script = """
import http.client, os, socket, sys
from horovod.runner.elastic.rendezvous import create_rendezvous_handler
from horovod.runner.http.http_client import put_data_into_kvstore, put_text_into_kvstore, read_data_from_kvstore
from horovod.runner.http.http_server import KVStoreServer, RendezvousServer

class Driver:
    registered = []
    def register_worker_server(self, *args):
        self.registered.append(args)

os.environ.pop("HVDTRAIN_SECRET", None)
driver, server = Driver(), KVStoreServer(verbose=0)
port = server.start_server(address="127.0.0.1")
put_data_into_kvstore("127.0.0.1", port, "runfunc", "func", {"a": 1})
assert read_data_from_kvstore("127.0.0.1", port, "runfunc", "func") == {"a": 1}
rendezvous = RendezvousServer()
other = rendezvous.start(create_rendezvous_handler(driver), address="127.0.0.1")
for number in (port, other):
    for method in ("HEAD", "POST", "GET", "PUT", "DELETE"):
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=5)
        connection.request(method, "/etc/passwd", b"")
        status = connection.getresponse().status
        assert status == (405 if method in ("HEAD", "POST") else 401), (method, status)
    try:
        socket.create_connection(("127.0.0.2", number), 5)
    except ConnectionRefusedError:
        pass
    else:
        raise AssertionError("listens on more than its address")
put_text_into_kvstore("127.0.0.1", other, "worker_addresses", "h:0", '{"lo": [["127.0.0.1", 7]]}')
(host, rank, addresses, key), = driver.registered
assert (host, rank, addresses, len(key)) == ("h", 0, {"lo": [("127.0.0.1", 7)]}, 64)
pickled = "gASVKAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjA10b3VjaCB0b3VjaGVklIWUUpQu"
for text in (pickled, "[]", '{"lo": 3}', '{"lo": [["a", "b"]]}'):
    try:
        put_text_into_kvstore("127.0.0.1", other, "worker_addresses", "h:0", text)
    except RuntimeError as error:
        assert "answer 400" in str(error), error
    else:
        raise AssertionError(text)
assert len(driver.registered) == 1
os.environ["HVDTRAIN_SECRET"] = "x" * 32
try:
    read_data_from_kvstore("127.0.0.1", port, "runfunc", "func")
except RuntimeError as error:
    assert "without this run's signature" in str(error), error
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=stretch(100), cwd=tmp_path
    )
    assert done.stdout == "fine\n", done.stderr
    assert not (tmp_path / "touched").exists()


def test_this_horovod_is_signed() -> None:
    record = installed.require_horovod().record
    assert record is not None and re.fullmatch(r"[0-9a-f]{64}", record.patches[installed.SIGNED_PATCH])
