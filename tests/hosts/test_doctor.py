"""`hvdtrain doctor -H` and what `hvdtrain launch` looks at first, over real hosts with real faults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.hosts import faults
from tests.hosts.cluster import Host, cluster
from tests.ranks.harness import BIN, HVDTRAIN, ROOT

pytestmark = [pytest.mark.usefixtures("machine_allows_clusters"), pytest.mark.alone]

ENVIRON = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def hvdtrain(hosts: list[Host], *words: str) -> subprocess.CompletedProcess[str]:
    """A command over hosts, on the first of them."""
    where = ["-H", ",".join(f"{host.name}:1" for host in hosts), "--nic", "eth0"]
    return hosts[0].run([*HVDTRAIN, *words, *where], ENVIRON, cwd=ROOT, timeout=110)


# What is wrong with each host of one cluster, as a pattern; the first two are well.
SICK = {
    "h2": r"torch 2\.9\.9, the other 7 have \d\S+",
    "h3": r"Horovod built as horovod0\.28\.1\S+, the other 7 have horovod0\.28\.1\S+",
    "h4": r"has no hvdtrain in \S+, or another version",
    "h5": r"has no \S+: it needs this Python at the same path",
    "h6": r"the disk is full: \S+ (B|KiB) is free in /run/tmp",
    "h7": r"cannot connect to this host: (No route to host|Network is unreachable); is there a firewall\?",
    "h8": r"has no interface eth0; it has ens7",
    "h9": r"rejects this host's ssh keys: .*Permission denied \(publickey\)\.?",
    "h10": r"accepts connections but does not respond: hung or overloaded",
    "h11": r"cannot be reached: .*(timed out|No route to host)",
    "h12": r"cannot be reached: .*(timed out|No route to host)",
}
LATE = r"host h13: its clock is 3[56]\d\d s behind this host's: synchronize it by NTP"


@pytest.fixture(scope="module")
def sick() -> Iterator[list[Host]]:
    with cluster(14) as hosts:
        faults.another_torch(hosts[2], "2.9.9")
        faults.another_wheel(hosts[3], "-march=x86-64")
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
    """So does each command that starts ranks as it does; this one need not import torch to check its arguments."""
    done = hvdtrain(sick, "bench", "allreduce")
    assert (done.returncode, done.stdout) == (1, "")
    warning, *lines = done.stderr.splitlines()
    assert re.fullmatch(f"hvdtrain: warning: {LATE}", warning)
    check_named([lines[0].removeprefix("hvdtrain: error: "), *lines[1:]])


def test_doctor_names_every_bad_host_and_starts_no_rank(sick: list[Host]) -> None:
    faults.loopback_name(sick[1])
    done = hvdtrain(sick, "doctor")
    assert (done.returncode, done.stderr) == (1, "")
    *told, verdict = done.stdout.split("\n\n")[-1].splitlines()
    check_named([verdict, *(line.removeprefix("wrong: ") for line in told if line.startswith("wrong: "))])
    late, own_name = [line.removeprefix("warning: ") for line in told if line.startswith("warning: ")][::-1]
    assert re.fullmatch(LATE, late)
    assert own_name == "host h1: its hostname resolves to 127.0.1.1; map it to its network address in /etc/hosts"


def test_a_healthy_cluster_is_all_fine_and_a_slow_link_is_named() -> None:
    with cluster(4) as hosts:
        begin = time.monotonic()
        done = hvdtrain(hosts, "doctor", "--json")
        print(f"{time.monotonic() - begin:.1f} s, load {os.getloadavg()[0]:.1f}")
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert (report["verdict"], report["findings"]) == ("all fine", [])
        assert len(report["links"]) == 12 and all(link["bits_per_second"] > 1e8 for link in report["links"])
        assert len(report["all_reduce"]) == 6 and all(pair["right"] for pair in report["all_reduce"])
        faults.slow_link(hosts[1], hosts[3], "10mbit")
        check_verdict(hosts, r"link h1-h3: \d{1,2}(\.\d+)? Mbit/s, the others \d{3,}")


@pytest.mark.slow
def test_a_cut_link_and_a_slow_host_are_named() -> None:
    with cluster(3) as hosts:
        faults.slow_cable(hosts[2], "10mbit")
        check_verdict(hosts, r"host h2: (sends )?\d{1,2}(\.\d+)? Mbit/s, the others \d{3,}")
        faults.cut_link(hosts[0], hosts[2])
        # By the hosts that are not the doctor's.
        check_verdict([hosts[1], hosts[0], hosts[2]], r"link h0-h2: h0 and h2 cannot connect to each other: .*")


@pytest.mark.slow
def test_a_busy_host_is_named() -> None:
    with cluster(3) as hosts:
        faults.burners(hosts[2], 4)
        check_verdict(hosts, r"host h2: it is busy: CPU slowdown \d\S*, on the others \d\.\d")


def check_verdict(hosts: list[Host], pattern: str) -> None:
    """The doctor's last line fits, and it names one that is bad."""
    done = hvdtrain(hosts, "doctor")
    assert done.returncode == 1, done
    assert re.fullmatch(pattern, done.stdout.splitlines()[-1]), done.stdout


def test_options_that_make_no_sense(sick: list[Host]) -> None:
    for words, message in (
        (["--hostfile", "nowhere"], "give -H or --hostfile, not both"),
        (["--launcher", "srun"], "--launcher srun: the doctor queries hosts over ssh; expected horovodrun or mpirun"),
    ):
        done = hvdtrain(sick, "doctor", *words)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"hvdtrain: error: {message}\n")
