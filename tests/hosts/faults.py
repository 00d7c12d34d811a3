"""Hosts made bad on purpose. What is changed on disk is mounted over the real thing, in that host alone."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import sysconfig
from pathlib import Path

from tests.hosts import furnish
from tests.hosts.cluster import Host
from tests.hosts.namespaces import NETWORK
from tests.ranks.harness import ROOT

SITE = Path(sysconfig.get_path("purelib"))


def do(host: Host, *command: str) -> str:
    """Run a system program in a host."""
    return furnish.do(host.first.pid, list(command))


def ip(host: Host, *arguments: str) -> None:
    """Change a host's network."""
    furnish.do(host.first.pid, ["ip", *arguments], NETWORK)


def cover(host: Host, path: Path, text: str) -> None:
    """Let a file have another text in a host."""
    inside = f"/run/covered-{path.name}"
    (furnish.root(host.first.pid) / inside.lstrip("/")).write_text(text)
    do(host, "mount", "--bind", inside, str(path))


def package(name: str) -> Path:
    """Where a package that is not imported lies."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def another_torch(host: Host, version: str) -> None:
    """By what torch says of itself: the library stays."""
    path = package("torch") / "version.py"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("__version__ =")]
    cover(host, path, "\n".join([*lines, f"__version__ = '{version}'", ""]))


def another_wheel(host: Host, cpu_flags: str) -> None:
    """As if Horovod was built for another CPU, by its record: the library stays."""
    path = package("horovod") / "hvdtrain_build.json"
    cover(host, path, json.dumps(json.loads(path.read_text()) | {"cpu_flags": cpu_flags}))


def no_hvdtrain(host: Host) -> None:
    """As in a host where it was not installed."""
    do(host, "mount", "-t", "tmpfs", "tmpfs", str(ROOT / "hvdtrain"))


def no_python(host: Host) -> None:
    do(host, "mount", "-t", "tmpfs", "tmpfs", sysconfig.get_path("scripts"))


def full_disk(host: Host) -> None:
    """The disk of temporary files."""
    folder = furnish.ENVIRONMENT["TMPDIR"]
    do(host, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    do(host, "dd", "if=/dev/zero", f"of={folder}/all", "bs=4k", "count=250")


def wrong_clock(host: Host, seconds: float) -> None:
    """Only Python's: the kernel has one clock for all namespaces."""
    # The one .pth file that every environment of these tests has is that of the editable install.
    path = next(path for path in sorted(SITE.glob("*.pth")) if path.stat().st_size)
    # The file may be read twice.
    late = f"lambda real=time.time: real() + ({seconds})"
    shift = f"import time; time.late = getattr(time, 'late', None) or ({late}); time.time = time.late"
    cover(host, path, f"{path.read_text().rstrip()}\n{shift}\n")


def no_way_back(host: Host, to: Host) -> None:
    """As a firewall that lets in what it should not let out: ssh works, connections to the other host do not."""
    ip(host, "rule", "add", "prio", "100", "ipproto", "tcp", "sport", "22", "lookup", "main")
    ip(host, "rule", "add", "prio", "200", "to", to.address, "unreachable")


def other_interface(host: Host, name: str) -> None:
    """Let eth0 have another name."""
    ip(host, "link", "set", "eth0", "down")
    ip(host, "link", "set", "eth0", "name", name)
    ip(host, "link", "set", name, "up")


def locked_door(host: Host) -> None:
    """Let its sshd know no key any more."""
    (furnish.root(host.first.pid) / "etc/ssh/authorized_keys").write_text("")


def slow_cable(host: Host, rate: str) -> None:
    """Let a host send at a rate, as tc writes it."""
    shape = ["tbf", "rate", rate, "burst", "32kb", "latency", "50ms"]
    furnish.do(host.first.pid, ["tc", "qdisc", "add", "dev", "eth0", "root", *shape], NETWORK)


def slow_link(one: Host, other: Host, rate: str) -> None:
    """Join two hosts by a cable of their own, slow both ways, which they use for each other."""
    ends = [one, other]
    furnish.do(
        one.first.pid,
        ["ip", "link", "add", "direct", "type", "veth", "peer", "name", "direct", "netns", str(other.first.pid)],
        NETWORK,
    )
    for host, far in (ends, ends[::-1]):
        ip(host, "link", "set", "direct", "up")
        shape = ["tbf", "rate", rate, "burst", "32kb", "latency", "50ms"]
        furnish.do(host.first.pid, ["tc", "qdisc", "add", "dev", "direct", "root", *shape], NETWORK)
        ip(host, "route", "add", far.address, "dev", "direct", "src", host.address)


def cut_link(one: Host, other: Host) -> None:
    """Lose what two hosts send each other."""
    ip(one, "route", "add", "blackhole", other.address)
    ip(other, "route", "add", "blackhole", one.address)


def loopback_name(host: Host) -> None:
    """As Debian's installer writes it."""
    path = furnish.root(host.first.pid) / "run/etc/hosts"
    path.write_text(path.read_text().replace(f"{host.address} {host.name}\n", f"127.0.1.1 {host.name}\n"))


def burners(host: Host, count: int) -> None:
    """Keep a core busy, and let the host have no other: its door, and so its ranks, stand on it too."""
    core = [max(os.sched_getaffinity(0))]
    for _ in range(count):
        # Sessions of their own: the kernel may share a core evenly between sessions.
        host.popen([sys.executable, "-S", "-c", "while True: pass"], start_new_session=True)
    for process in host.processes():
        process.cpu_affinity(core)
