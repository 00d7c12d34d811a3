"""The cluster that other tests stand on: names, ssh, the rate, the faults, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdtrain.system.cpus import USABLE_CPUS
from tests.hosts.cluster import Host, cluster, missing
from tests.hosts.namespaces import living_in
from tests.ranks.harness import ROOT, skip_or_fail
from tests.support.limits import stretch

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")

PING = ["-o", "ConnectTimeout=2", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2"]
RECEIVE = """
import socket, time
with socket.create_server(("", 7000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
with connection:
    total, begin = 0, time.perf_counter()
    while data := connection.recv(1 << 20):
        total += len(data)
print(8e-6 * total / (time.perf_counter() - begin))
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def two() -> Iterator[list[Host]]:
    with cluster(2) as hosts:
        yield hosts


def ssh(source: Host, to: str, *command: str) -> subprocess.CompletedProcess[str]:
    return source.run(["ssh", *PING, to, *command], timeout=20)


def megabits(source: Host, to: Host, size: int) -> float:
    """How fast one connection carries so many bytes, in Mbit/s."""
    with to.popen([sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None and receiver.stdout.readline() == "ready\n"
        sent = source.run([sys.executable, "-c", SEND, to.address, str(size)])
        assert sent.returncode == 0, sent.stderr
        return float(receiver.communicate(timeout=stretch(30))[0])


def test_hosts_have_names_and_find_each_other(two: list[Host]) -> None:
    for host in two:
        assert host.run(["hostname"]).stdout == f"{host.name}\n"
        for other in two:
            assert host.run(["getent", "hosts", other.name]).stdout.split() == [other.address, other.name]
        assert host.run(["ip", "-o", "-4", "address", "show", "eth0"]).stdout.count(f" {host.address}/24 ") == 1


def test_hosts_see_their_own_processes_only(two: list[Host]) -> None:
    sleep = two[0].popen(["sleep", "1000"])
    assert "sleep 1000" in two[0].run(["ps", "ax"]).stdout
    assert "sleep 1000" not in two[1].run(["ps", "ax"]).stdout
    assert sleep.pid in [process.pid for process in two[0].processes()]
    sleep.send_signal(signal.SIGINT)
    assert sleep.wait(stretch(10)) == -signal.SIGINT


def test_a_command_has_its_environment_folder_and_time_limit(two: list[Host], tmp_path: Path) -> None:
    done = two[0].run(["sh", "-c", "echo $WORD; pwd; exit 7"], {"WORD": "yes"}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, f"yes\n{tmp_path}\n")
    with pytest.raises(subprocess.TimeoutExpired):
        two[0].run(["sleep", "1001"], timeout=0.2)
    assert "sleep 1001" not in two[0].run(["ps", "ax"]).stdout


def test_ssh_asks_nothing(two: list[Host]) -> None:
    for host in two:
        for other in two:
            done = ssh(host, other.name, "hostname")
            assert (done.returncode, done.stdout, done.stderr) == (0, f"{other.name}\n", "")
    # As horovodrun says it.
    options = ["-o", "PasswordAuthentication=no", "-o", "StrictHostKeyChecking=no"]
    assert two[0].run(["ssh", *options, "h1", "true"]).returncode == 0
    # sshd is on eth0 only, where the machine's own, if there is one, is not.
    assert "refused" in ssh(two[0], "127.0.0.1", "hostname").stderr


def test_own_name_may_be_127_0_1_1() -> None:
    with cluster(2, loopback_names=True) as (first, second):
        assert first.run(["getent", "ahostsv4", "h0"]).stdout.split()[0] == "127.0.1.1"
        assert second.run(["getent", "ahostsv4", "h0"]).stdout.split()[0] == first.address
        assert ssh(first, "h1", "hostname").stdout == "h1\n"


@pytest.mark.alone
def test_rate_is_kept_and_without_one_is_not(two: list[Host]) -> None:
    with cluster(2, "100mbit") as (first, second):
        assert 70 < megabits(first, second, 8_000_000) < 110
        second.cut()
        second.mend()
        assert 70 < megabits(second, first, 8_000_000) < 110
    assert megabits(two[0], two[1], 50_000_000) > 300


def test_cut_and_mend(two: list[Host]) -> None:
    two[1].cut()
    begin = time.monotonic()
    done = ssh(two[0], "h1", "hostname")
    assert done.returncode == 255 and done.stdout == ""
    assert time.monotonic() - begin > 1, "told at once"
    assert two[1].run(["hostname"]).stdout == "h1\n"
    two[1].mend()
    assert ssh(two[0], "h1", "hostname").stdout == "h1\n"


def test_freeze_and_thaw(two: list[Host]) -> None:
    count = "i=0; while sleep 0.02; do i=$((i+1)); echo $i; done"
    with two[1].popen(["sh", "-c", count], stdout=subprocess.PIPE) as counter:
        assert counter.stdout is not None
        os.set_blocking(counter.stdout.fileno(), False)
        wait_for_output(counter)
        two[1].freeze()
        counter.stdout.read()
        assert ssh(two[0], "h1", "hostname").returncode == 255
        assert not counter.stdout.read()
        two[1].thaw()
        assert ssh(two[0], "h1", "hostname").stdout == "h1\n"
        wait_for_output(counter)
        counter.kill()


def wait_for_output(process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + stretch(10)
    assert process.stdout is not None
    while not process.stdout.read():
        assert time.monotonic() < until, "no output"
        time.sleep(0.02)


def test_down_ends_all_of_one_host() -> None:
    with cluster(3) as hosts:
        space = spaces(hosts[1:2])
        process = hosts[1].popen(["sleep", "1000"])
        hosts[1].freeze()
        hosts[1].down()
        assert process.returncode == -signal.SIGKILL
        assert living_in(space) == []
        assert ssh(hosts[0], "h1", "hostname").returncode == 255
        assert ssh(hosts[0], "h2", "hostname").stdout == "h2\n"


def spaces(hosts: list[Host]) -> set[int]:
    return {(Path("/proc") / str(host.first.pid) / "ns" / "pid").stat().st_ino for host in hosts}


def traces() -> dict[str, object]:
    """What of a cluster could be left on the machine."""
    links = subprocess.run(["ip", "-o", "-br", "link"], capture_output=True, text=True, check=True)
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    # Other tests have named namespaces.
    kept = sorted(line for line in mounts if "netns" not in line)
    files = sorted(str(path) for folder in ("/etc/ssh", str(Path.home() / ".ssh")) for path in Path(folder).glob("*"))
    texts = [Path(name).read_text() for name in ("/etc/hosts", "/etc/hostname", "/etc/shadow") if Path(name).exists()]
    return {"links": links.stdout, "mounts": kept, "files": files, "texts": texts, "name": os.uname().nodename}


def test_two_clusters_do_not_meet_and_nothing_is_left() -> None:
    before = traces()
    with cluster(2) as one, cluster(2) as other:
        inside = spaces(one) | spaces(other)
        assert len(inside) == 4
        one[0].popen(["sleep", "1000"])
        assert ssh(one[0], "h1", "hostname").stdout == ssh(other[0], "h1", "hostname").stdout == "h1\n"
        # What ssh starts, and forgets, ends too.
        assert ssh(one[0], "h1", "setsid sleep 1002 >/dev/null 2>&1 </dev/null & echo on").stdout == "on\n"
        assert traces() == before
    assert living_in(inside) == []
    assert traces() == before


def test_nothing_is_left_after_an_exception() -> None:
    before = traces()
    inside: set[int] = set()
    with pytest.raises(ZeroDivisionError), cluster(2) as hosts:
        inside = spaces(hosts)
        hosts[1].popen(["sleep", "1000"])
        hosts[1].freeze()
        raise ZeroDivisionError
    assert len(inside) == 2 and living_in(inside) == []
    assert traces() == before


OWNER = """
import time
from tests.hosts.cluster import cluster
from tests.hosts.test_cluster import spaces
with cluster(2) as hosts:
    hosts[0].popen(["ssh", "h1", "sleep", "1003"])
    hosts[1].popen(["sleep", "1003"])
    hosts[1].freeze()
    print(*spaces(hosts), flush=True)
    time.sleep(1000)
"""


def test_nothing_is_left_when_the_owner_is_killed() -> None:
    before = traces()
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        inside = {int(word) for word in owner.stdout.readline().split()}
        assert len(living_in(inside)) > 4
        owner.kill()
    until = time.monotonic() + stretch(10)
    while living_in(inside):
        assert time.monotonic() < until, living_in(inside)
        time.sleep(0.05)
    assert traces() == before


def test_cluster_is_controlled_from_the_command_line() -> None:
    def by_hand(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.hosts", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=stretch(40))

    if by_hand("run", "h0", "--", "true").returncode == 0:
        pytest.skip("somebody has a cluster up by hand: python -m tests.hosts down")
    assert by_hand("down").stderr == "tests.hosts: no cluster is up\n"
    try:
        assert by_hand("up", "2", "--rate", "1gbit").returncode == 0
        assert by_hand("up", "2").returncode == 2
        assert by_hand("run", "h0", "--", "ssh", "h1", "hostname").stdout == "h1\n"
        assert by_hand("run", "h1", "--", "sh", "-c", "exit 9").returncode == 9
        assert by_hand("run", "h7", "--", "hostname").stderr == "tests.hosts: there is no host h7\n"
    finally:
        assert by_hand("down").returncode == 0
    assert by_hand("run", "h0", "--", "true").returncode == 2


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.setattr("tests.hosts.furnish.SYSTEM_PATH", "")
    assert missing() == "clusters of namespaces need the program ip (package iproute2)"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "clusters of namespaces need root"


def test_hosts_with_cores_of_their_own() -> None:
    if len(USABLE_CPUS) < 2:
        skip_or_fail("two hosts with cores of their own need two cores")
    ask = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    with cluster(2, own_cores=True) as hosts:
        first = json.loads(hosts[0].run(ask).stdout)
        second = json.loads(ssh(hosts[0], "h1", shlex.join(ask)).stdout)
    assert first and second and set(first) | set(second) == USABLE_CPUS and not set(first) & set(second)
