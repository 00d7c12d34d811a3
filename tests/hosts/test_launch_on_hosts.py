"""Every launcher gives the same training on every layout of hosts, and hands on no more than it should."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.hosts import furnish
from tests.hosts.cluster import Host, cluster
from tests.hosts.launching import (
    DIGITS,
    HOROVODRUN,
    HOROVODRUN_MPI,
    MPIRUN,
    at_work,
    end,
    launched,
    losses_alone,
    ranks,
)
from tests.ranks.harness import rows, wait_for_step
from tests.support.limits import stretch
from tests.support.slow_cases import slow

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")

WAYS = {"gloo": HOROVODRUN, "horovodrun-mpi": HOROVODRUN_MPI, "mpirun": MPIRUN}
TEN_EPOCHS = ["--epochs", "10", "--log-every", "1"]
SECRET = "hush-4711"
GIVEN = "not-a-secret-0815"
# An alias that only ssh knows, behind another port and key than the host's own.
ALIAS = """Host far
    HostName h2
    HostKeyAlias h2
    Port 2222
    IdentityFile /run/other-key
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses_alone(tmp_path_factory.mktemp("alone") / "run", *TEN_EPOCHS)


@pytest.fixture(scope="module")
def five() -> Iterator[list[Host]]:
    with cluster(5) as hosts:
        yield hosts


# Four hosts, and a head that is none of them; two hosts with two ranks each.
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("way", "where"),
    [
        ("mpirun", "h0:2,h1:2"),
        *slow(("gloo", "h0:2,h1:2"), ("horovodrun-mpi", "h0:2,h1:2")),
        *slow(*((way, "h1:1,h2:1,h3:1,h4:1") for way in WAYS)),
    ],
)
def test_digits_is_trained_as_in_one_process(
    way: str, where: str, five: list[Host], alone: list[float], tmp_path: Path
) -> None:
    layout = {name: int(slots) for name, slots in (item.split(":") for item in where.split(","))}
    hidden = {"API_TOKEN": SECRET, "DATA_DIR": GIVEN}
    run_dir = tmp_path / "run"
    with launched(five, where, run_dir, *WAYS[way], "--env", "DATA_DIR", DIGITS, *TEN_EPOCHS, env=hidden) as process:
        while process.poll() is None and sum(len(ranks(host)) for host in five) < sum(layout.values()):
            time.sleep(0.1)
        spread = {host.name: len(ranks(host)) for host in five if ranks(host)}
        check_environment(five, process.pid)
        code, out, err = end(process, 150)
    assert code == 0, f"{out}\n{err}"
    assert spread == layout
    assert len(alone) == 120
    losses = [row["loss"] for row in rows(run_dir)]
    # What another order of additions rounds otherwise grows with the steps.
    assert losses[:48] == pytest.approx(alone[:48], rel=1e-5)
    assert losses == pytest.approx(alone, rel=1e-2)
    assert json.loads((run_dir / "summary.json").read_text())["eval"]["accuracy"] >= 0.97


def check_environment(hosts: Sequence[Host], launch: int) -> None:
    """What was not named is nowhere but in launch itself; what was, is in every rank."""
    for process in at_work(hosts):
        with suppress(psutil.NoSuchProcess):
            if process.pid != launch:
                assert SECRET not in " ".join(process.cmdline()), process.cmdline()
                assert "API_TOKEN" not in process.environ(), process.cmdline()
    for rank in (rank for host in hosts for rank in ranks(host)):
        with suppress(psutil.NoSuchProcess):
            assert rank.environ()["DATA_DIR"] == GIVEN


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_only_the_configuration_of_ssh_knows(way: str, five: list[Host], tmp_path: Path) -> None:
    """Its own port and key are used, and Ctrl-C finds its way there as well: rank 0 is on that host."""
    options = [*WAYS[way], DIGITS, "--epochs", "10000", "--log-every", "1"]
    with other_door(five[0], five[2]), launched(five, "far:1,h0:2", tmp_path / "run", *options) as process:
        wait_for_step(tmp_path / "run", 3, timeout=150)
        spread = {host.name: len(ranks(host)) for host in five if ranks(host)}
        process.send_signal(signal.SIGINT)
        code, out, err = end(process, 100)
    assert code == 75, f"{out}\n{err}"
    assert spread == {"h2": 1, "h0": 2}


@contextmanager
def other_door(client: Host, server: Host) -> Iterator[None]:
    """A second sshd on a host, that takes another key, which the client's ssh finds by its configuration alone."""
    folder = furnish.root(server.first.pid) / "etc/ssh"
    private, public = furnish.client_key(server.first.pid)
    environment = " ".join(f"{name}={value}" for name, value in furnish.ENVIRONMENT.items())
    text = furnish.SERVER.format(listen=f"ListenAddress {server.address}:2222", environment=environment)
    (folder / "other_config").write_text(text.replace("authorized_keys", "other_keys"))
    (folder / "other_keys").write_text(public)
    inside = furnish.root(client.first.pid)
    key, config = inside / "run/other-key", inside / "etc/ssh/ssh_config"
    key.touch(mode=0o600)
    key.write_text(private)
    before = config.read_text()
    config.write_text(ALIAS + before)
    sshd = furnish.program("sshd")
    assert sshd is not None
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    door = server.popen([sshd, "-D", "-f", "/etc/ssh/other_config"], {"PATH": furnish.SYSTEM_PATH}, **options)
    try:
        yield
    finally:
        config.write_text(before)
        for path in (key, furnish.root(server.first.pid) / furnish.KEYS.lstrip("/")):
            path.unlink()
        door.terminate()
        door.wait(stretch(10))
        server.started.remove(door)
