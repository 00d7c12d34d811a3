"""`hvdtrain doctor -H` and what `hvdtrain launch` looks at first, over real hosts with real faults."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.hosts import faults
from tests.hosts.cluster import Host, cluster
from tests.hosts.test_train_on_hosts import DIGITS
from tests.ranks.harness import BIN, HVDTRAIN, ROOT

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")

ENVIRON = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def hvdtrain(hosts: list[Host], *words: str) -> subprocess.CompletedProcess[str]:
    """A command over hosts, on the first of them."""
    where = ["-H", ",".join(f"{host.name}:1" for host in hosts), "--nic", "eth0"]
    return hosts[0].run([*HVDTRAIN, words[0], *where, *words[1:]], ENVIRON, cwd=ROOT)


# What is wrong with each host of one cluster, as a pattern; the first two are well.
SICK = {
    "h2": r"torch 2\.9\.9, the other 7 have \d\S+",
    "h3": r"Horovod built as horovod-of-yesterday, the other 7 have horovod0\.28\.1\S+",
    "h4": r"has no hvdtrain in \S+, or another one",
    "h5": r"has no \S+: it needs this Python at the same path",
    "h6": r"the disk is full: \S+ (B|KiB) is free in /run/tmp",
    "h7": r"cannot connect to this host: (No route to host|Network is unreachable); is there a firewall\?",
    "h8": r"has no interface eth0; it has ens7",
    "h9": r"lets nobody in by the ssh keys that are here: .*Permission denied \(publickey\)\.?",
    "h10": r"takes connections and does not answer: it hangs, or has no time",
    "h11": r"cannot be reached: .*(timed out|No route to host)",
    "h12": r"cannot be reached: .*(timed out|No route to host)",
}
LATE = r"host h13: its clock is 3[56]\d\d s behind this host's: set it by NTP"


@pytest.fixture(scope="module")
def sick() -> Iterator[list[Host]]:
    with cluster(14) as hosts:
        faults.another_torch(hosts[2], "2.9.9")
        faults.another_wheel(hosts[3], "horovod-of-yesterday")
        faults.no_hvdtrain(hosts[4])
        faults.no_python(hosts[5])
        faults.full_disk(hosts[6])
        faults.no_way_back(hosts[7], hosts[0])
        faults.other_interface(hosts[8], "ens7")
        faults.locked_door(hosts[9])
        hosts[10].freeze()
        hosts[11].down()
        hosts[12].cut()
        faults.wrong_clock(hosts[13], -3600)
        yield hosts


def check_named(lines: list[str]) -> None:
    """Each sick host is named with its cause, and no other."""
    for host, pattern in SICK.items():
        assert [line for line in lines if re.fullmatch(f"host {host}: {pattern}", line)], (host, lines)
    assert len(lines) == len(SICK), lines


def test_launch_names_every_bad_host_before_any_rank_starts(sick: list[Host]) -> None:
    begin = time.monotonic()
    done = hvdtrain(sick, "launch", DIGITS)
    print(time.monotonic() - begin, done.stderr)
    assert (done.returncode, done.stdout) == (1, "")
    warning, *lines = done.stderr.splitlines()
    assert re.fullmatch(f"hvdtrain: warning: {LATE}", warning)
    assert lines[0].startswith("hvdtrain: error: ")
    check_named([lines[0].removeprefix("hvdtrain: error: "), *lines[1:]])
