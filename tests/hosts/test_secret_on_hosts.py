"""The secret of a run reaches its ranks on other hosts, and no command line; what listens does so on one interface."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hvdtrain.system.signed_http import SECRET
from tests.hosts.cluster import Host, cluster
from tests.hosts.launching import DIGITS, SSHD, at_work, ranks
from tests.ranks.elastic import RECIPE, losses
from tests.ranks.harness import BIN, HVDTRAIN, ROOT
from tests.support.limits import stretch
from tests.support.processes import kill_all
from tests.support.slow_cases import slow

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")
TRAIN = [DIGITS, "--epochs", "1", "--threads", "1", "--log-every", "1"]
# Without --nic, horovodrun finds the interface by services of its own, which have a key too.
BARE = [str(BIN / "horovodrun"), "--gloo", "-np", "2", "-H", "h0:1,h1:1", *HVDTRAIN, "train", *TRAIN]
STATIC = [*HVDTRAIN, "launch", "-H", "h0:1,h1:1", *TRAIN]
MPIRUN = [*HVDTRAIN, "launch", "--launcher", "mpirun", "-H", "h0:1,h1:1", *TRAIN]
ELASTIC = [*HVDTRAIN, "launch", "--elastic", "--min-np", "2", "-H", "h0:1,h1:1", RECIPE, "--pause", "0.05", *TRAIN[1:]]


@pytest.fixture(scope="module")
def two() -> Iterator[list[Host]]:
    with cluster(2) as hosts:
        yield hosts


@pytest.mark.parametrize(
    "line", [*slow(BARE, STATIC), ELASTIC, *slow(MPIRUN)], ids=["horovodrun", "launch", "elastic", "mpirun"]
)
def test_the_secret_is_on_no_command_line(line: list[str], two: list[Host], tmp_path: Path) -> None:
    shown: set[str] = set()
    found: dict[str, set[str]] = {host.name: set() for host in two}
    open_to_all: set[tuple[str, int]] = set()
    environ = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "output"
    with output.open("w") as said:
        command = [*line, "--run-dir", str(tmp_path / "run")]
        process = two[0].popen(command, environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        until = time.monotonic() + stretch(100)
        while process.poll() is None:
            assert time.monotonic() < until, output.read_text()
            for host in two:
                for one in host.processes():
                    try:
                        shown.add(" ".join(one.cmdline()))
                        if one in ranks(host):
                            found[host.name].add(one.environ().get(SECRET, ""))
                        if one.name() != SSHD and "prte" not in one.name() and "mpirun" not in " ".join(one.cmdline()):
                            connections = one.net_connections("tcp4")
                            open_to_all |= {one.laddr for one in connections if one.laddr and one.status == "LISTEN"}
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        continue
            time.sleep(0.02)
    finally:
        process.kill()
        kill_all(at_work(two))
    text = output.read_text()
    assert process.returncode == 0, text
    assert len(losses(tmp_path / "run")) == 12
    secrets = set.union(*found.values())
    assert len(secrets) == 1 and all(found.values()), f"{found}\n{text}"
    (secret,) = secrets
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert any("ssh" in line and "h1" in line for line in shown)
    assert not [line for line in shown if secret in line or f"{SECRET}=" in line]
    assert not [line for line in shown if "StrictHostKeyChecking=no" in line]
    if line is not MPIRUN and line is not BARE:  # whose services look for an interface that is common to all hosts
        assert not [where for where in open_to_all if where[0] in ("0.0.0.0", "::")], open_to_all
