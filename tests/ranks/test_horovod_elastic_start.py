"""A bare elastic horovodrun starts on one host without --network-interfaces, and says what it waits for (patch 89)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from horovod.runner.common.util.timeout import TimeoutException
from horovod.runner.driver.driver_service import get_local_interfaces
from horovod.runner.elastic import driver
from horovod.runner.elastic.discovery import FixedHosts
from horovod.runner.http.http_server import RendezvousServer

from tests.ranks.harness import BIN, Job

RANK = "import os; print('INTERFACE', os.environ['HOROVOD_GLOO_IFACE'])"


def test_ranks_on_this_host_alone_use_the_loopback_interface(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("#!/bin/sh\necho localhost:2\n")
    hosts.chmod(0o755)
    command = [str(BIN / "horovodrun"), "-np", "2", "--host-discovery-script", str(hosts)]
    with Job([*command, sys.executable, "-S", "-c", RANK]) as job:
        done = job.finish(timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("INTERFACE lo") == 2
    assert "can take part only if --network-interfaces names another" in done.stderr


def test_an_interface_that_was_named_is_used_on_this_host() -> None:
    assert get_local_interfaces(SimpleNamespace(nics={"eth7"}, verbose=0)) == {"eth7"}
    assert get_local_interfaces(SimpleNamespace(nics=None, verbose=0)) == {"lo"}


def test_a_start_that_waits_for_a_second_host_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "ANNOUNCE_WAIT_SECS", 0.1)
    waiting = driver.ElasticDriver(RendezvousServer(), FixedHosts({"elsewhere": 2}), 2, 4, timeout=1)
    try:
        with pytest.raises(TimeoutException, match=r"Timed out waiting for minimum number of slots.*two hosts"):
            waiting.wait_for_available_slots(2, min_hosts=2)
    finally:
        waiting._shutdown.set()
        waiting._discovery_thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("horovodrun: waiting for 2 slots on 2 hosts, to find the network interface that they share")
    assert "--network-interfaces" in line and "found 2 on 1 host(s); giving up in 1 s" in line
