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
from tests.support.limits import stretch
from tests.support.slow_cases import slow

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")


def power_off(host: Host) -> None:
    host.down()


def cut_off(host: Host) -> None:
    host.cut()


class Launched:
    """`hvdtrain launch --elastic` on a host, for as long as it is entered."""

    def __init__(self, folder: Path, host: Host, *options: str) -> None:
        self.listed, self.run_dir, self.output = folder / "hosts", folder / "run", folder / "said"
        script = folder / "discover.sh"
        script.write_text(f'#!/bin/sh\ncat "{self.listed}"\n')
        script.chmod(0o755)
        command = [*HVDTRAIN, "launch", "--elastic", "--min-np", "1", "--max-np", "3", "--discovery", str(script)]
        command += [*options, "--nic", "eth0", RECIPE, "--run-dir", str(self.run_dir), "--log-every", "1"]
        self.host, self.command = host, command

    def start(self, listed: str, pause: str) -> None:
        self.listed.write_text(listed)
        environ = {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HVDTRAIN_LEASE": str(LEASE),
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "5",
        }
        command = [*self.command, "--pause", pause]
        with self.output.open("w") as output:
            self.process = self.host.popen(
                command, environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def end(self) -> None:
        """Wait for the end, at which every step was made once."""
        assert self.process.wait(timeout=stretch(120)) == 0, self.output.read_text()
        assert len(losses(self.run_dir)) == 72
        verify(self.run_dir)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("lose", [power_off, *slow(cut_off)], ids=["power", "link"])
def test_a_host_joins_and_another_is_lost(tmp_path: Path, lose: Callable[[Host], None]) -> None:
    """The first host holds the launcher; the second is lost without a word, after the third has joined."""
    with cluster(3) as hosts, Launched(tmp_path, hosts[0]) as launched:
        first, second, third = (f"{host.name}:1\n" for host in hosts)
        launched.start(first + second, pause="0.4")
        wait_for_step(launched.run_dir, 3)
        launched.listed.write_text(first + second + third)
        wait_for_world(launched.run_dir, launched.output, "3 ranks")
        lose(hosts[1])
        wait_for_world(launched.run_dir, launched.output, "2 ranks")
        launched.end()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_all_hosts_are_replaced(tmp_path: Path) -> None:
    """At once: those that go save, and the whole job starts again on the others."""
    with cluster(4) as hosts, Launched(tmp_path, hosts[0], "--relaunch", "2") as launched:
        names = [f"{host.name}:1\n" for host in hosts]
        launched.start("".join(names[:2]), pause="0.2")
        wait_for_step(launched.run_dir, 8)
        launched.listed.write_text("".join(names[2:]))
        launched.end()
        said = launched.output.read_text()
        assert "relaunch 1 of 2" in said and "relaunch 2" not in said


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
