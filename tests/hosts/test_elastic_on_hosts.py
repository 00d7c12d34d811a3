"""Elastic runs over real hosts: one joins, one loses its power, one is cut off, and the ledger says exactly once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.cluster import Host, cluster
from tests.ranks.elastic import LEASE, RECIPE, losses, verify
from tests.ranks.harness import BIN, HVDTRAIN, ROOT, wait_for_step

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")


def power_off(host: Host) -> None:
    host.down()


def cut_off(host: Host) -> None:
    host.cut()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("lose", [power_off, cut_off], ids=["power", "link"])
def test_a_host_joins_and_another_is_lost(tmp_path: Path, lose: Callable[[Host], None]) -> None:
    """The first host holds the launcher; the second is lost without a word, after the third has joined."""
    listed, run_dir, said = tmp_path / "hosts", tmp_path / "run", tmp_path / "said"
    script = tmp_path / "discover.sh"
    script.write_text(f'#!/bin/sh\ncat "{listed}"\n')
    script.chmod(0o755)
    with cluster(3) as hosts:
        first, second, third = (f"{host.name}:1\n" for host in hosts)
        listed.write_text(first + second)
        command = [*HVDTRAIN, "launch", "--elastic", "--min-np", "1", "--max-np", "3", "--discovery", str(script)]
        command += ["--nic", "eth0", RECIPE, "--run-dir", str(run_dir), "--pause", "0.4", "--log-every", "1"]
        environ = {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HVDTRAIN_LEASE": str(LEASE),
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "5",
        }
        with said.open("w") as output:
            launch = hosts[0].popen(command, environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for_step(run_dir, 3)
            listed.write_text(first + second + third)
            wait_for_world(run_dir, said, "3 ranks")
            lose(hosts[1])
            wait_for_world(run_dir, said, "2 ranks")
            assert launch.wait(timeout=120) == 0, said.read_text()
        finally:
            launch.kill()
    assert len(losses(run_dir)) == 72
    verify(run_dir)


def wait_for_world(run_dir: Path, said: Path, size: str) -> None:
    """Wait, step by step, until the newest world is of this size."""
    for _ in range(200):
        worlds = [line for line in said.read_text().splitlines() if "world     " in line]
        if worlds and size in worlds[-1]:
            return
        try:
            wait_for_step(run_dir, len(losses(run_dir)) + 1, timeout=40)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{said.read_text()}") from None
    raise AssertionError(said.read_text())
