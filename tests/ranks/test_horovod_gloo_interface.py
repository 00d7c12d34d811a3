"""Gloo between two hosts uses the selected interface, even if the hostname resolves to 127.0.1.1 (as on Debian).

Two network namespaces stand for the hosts. Without patch 70-gloo-interface this fails with
"connect [127.0.1.1]: Connection refused".
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdtrain.system.signed_http import SECRET
from tests.support.limits import stretch

LIMIT = 60  # seconds

# The rank's own script. Rank 0 also serves the rendezvous; it passes the port on in a file, as a launcher would.
RANK = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    port = Path(sys.argv[1])
    if os.environ["HOROVOD_RANK"] == "0":
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer
        server = RendezvousServer(verbose=0)
        number = server.start()
        server.init(get_host_assignments(parse_hosts("one:1,two:1"), 2))
        port.with_suffix(".part").write_text(str(number))
        port.with_suffix(".part").rename(port)
    while not port.exists():
        time.sleep(0.05)
    os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] = port.read_text()
    import torch
    import horovod.torch as hvd
    hvd.init()
    total = hvd.allreduce(torch.full((1000,), float(hvd.rank() + 1)), op=hvd.Sum, name="sum")
    print("SUM", hvd.rank(), hvd.size(), sorted(set(total.tolist())), flush=True)
    hvd.shutdown()
""")


def ip(*arguments: str) -> None:
    """Run `ip`; fails with its output."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=stretch(20))
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def skip(why: str) -> None:
    """Skip the test for a reason, but fail on CI, which has all prerequisites."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{why} (and CI=true)")
    pytest.skip(why)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Create two namespaces joined by a veth pair, eth0 at both ends: {name: address}."""
    if os.geteuid() != 0:
        skip("network namespaces need root")
    if shutil.which("ip") is None:
        skip("no `ip` (iproute2)")
    tag = f"hvt{os.getpid()}"
    names = {f"{tag}a": "10.213.0.1", f"{tag}b": "10.213.0.2"}
    folders = [Path("/etc/netns") / name for name in names]
    had_netns = Path("/etc/netns").exists()
    try:
        for (name, address), folder in zip(names.items(), folders, strict=True):
            ip("netns", "add", name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n# {address}\n")
        first, second = names
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in names.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=stretch(20))
            shutil.rmtree(folder, ignore_errors=True)
        if not had_netns:
            Path("/etc/netns").rmdir()


def start_rank(rank: int, namespace: str, server: str, port: Path) -> subprocess.Popen[str]:
    """Start one rank in one namespace, as one rank of two hosts."""
    settings = {
        "RANK": rank,
        "SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_SIZE": 1,
        "CROSS_RANK": rank,
        "CROSS_SIZE": 2,
        "HOSTNAME": ("one", "two")[rank],
        "GLOO_RENDEZVOUS_ADDR": server,
        "GLOO_IFACE": "eth0",
        "GLOO_TIMEOUT_SECONDS": 30,
        "CONTROLLER": "gloo",
        "CPU_OPERATIONS": "gloo",
    }
    env = os.environ | {f"HOROVOD_{name}": str(value) for name, value in settings.items()}
    env[SECRET] = "s" * 64
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", RANK, str(port)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(150)
def test_allreduce_between_hosts_whose_name_is_127_0_1_1(hosts: dict[str, str], tmp_path: Path) -> None:
    first, second = hosts
    resolved = subprocess.run(
        [
            "ip",
            "netns",
            "exec",
            first,
            sys.executable,
            "-c",
            "import socket; print(socket.gethostbyname(socket.gethostname()))",
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert resolved.stdout.strip() == "127.0.1.1", f"the trap is not set: {resolved}"
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank, namespace in enumerate((first, second)):
            ranks.append(start_rank(rank, namespace, hosts[first], tmp_path / "port"))
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
        outputs = [rank.communicate()[0] for rank in ranks]
    for number, output in enumerate(outputs):
        assert f"SUM {number} 2 [3.0]" in output, f"after at most {LIMIT} s:\n" + "\n".join(outputs)
    assert [rank.returncode for rank in ranks] == [0, 0]
