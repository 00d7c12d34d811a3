"""Real hosts on one Linux machine, for tests and benchmarks.

Each host has a hostname, processes, an interface eth0, an sshd and faults of its own; the disk is the machine's, as if
every host had mounted the same file server. They are joined by a switch, and nothing leads out of it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from hvdtrain.system.cpus import USABLE_CPUS, select_cores
from tests.hosts import furnish
from tests.hosts.namespaces import NETWORK, members, start_first, start_in
from tests.support.limits import stretch

PREFIX = "10.213.7."  # seen within the cluster only: two clusters, and the machine, may have the same
LOOPBACK_NAME = "127.0.1.1"
MOST = 200  # hosts
BURST = "256kb"
PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "mount": "mount",
    "hostname": "hostname",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "ss": "iproute2",
}


@dataclass
class Host:
    """One host of a cluster."""

    name: str
    address: str
    first: subprocess.Popen[bytes]  # ends with all that runs in the host
    switch: int  # the process that holds the switch
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def popen(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command here, with `env` over this process's environment; `options` are Popen's."""
        process = start_in(self.first.pid, command, env=environment(env), **options)
        self.started.append(process)
        return process

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float | None = 60,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end, with its output as text.

        Raises subprocess.TimeoutExpired if it takes longer; it is killed then.
        """
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with self.popen(command, env, **{**streams, **options}) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        self.started.remove(process)
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    def processes(self) -> list[psutil.Process]:
        """All that runs here, but for the first process, which only keeps the host."""
        return members(self.first.pid)

    def cut(self) -> None:
        """Pull the cable: what is sent, in either direction, is lost, and nobody is told."""
        furnish.do(self.switch, ["ip", "link", "set", self.name, "down"], NETWORK)

    def mend(self) -> None:
        """Plug the cable in again."""
        furnish.do(self.switch, ["ip", "link", "set", self.name, "up"], NETWORK)

    def freeze(self) -> None:
        """Stop all processes, as a machine that hangs: connections stay, nothing answers."""
        until = time.monotonic() + stretch(10)
        # A process that is not stopped yet may start another.
        while moving := [process for process in self.processes() if moves(process)]:
            for process in moving:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            if time.monotonic() > until:
                raise RuntimeError(f"{self.name} does not freeze: {moving}")
            time.sleep(0.01)

    def thaw(self) -> None:
        """Let the processes go on."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def down(self) -> None:
        """Lose the power: no process is left, and no link; there is no way back. A second time does nothing."""
        if self.first.returncode is not None:
            return
        self.first.kill()
        # The first process ends when all others have, and those that are children of ours have been waited for.
        for process in self.started:
            process.wait(stretch(30))
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self.first.wait(stretch(30))
        close_input(self.first)
        # Otherwise it goes with the host's network namespace, some time soon.
        with contextlib.suppress(RuntimeError, OSError):
            furnish.do(self.switch, ["ip", "link", "delete", self.name], NETWORK)


@contextlib.contextmanager
def cluster(
    n: int,
    rate: str | None = None,
    *,
    latency: str = "50ms",
    loopback_names: bool = False,
    own_cores: bool = False,
) -> Iterator[list[Host]]:
    """Hosts h0, h1, ... joined by a switch; `rate` (as tc writes it: 1gbit) limits what each of them sends.

    With `loopback_names`, a host's own name is 127.0.1.1 there, as Debian's installer writes it.
    With `own_cores`, each host has an equal part of the machine's cores to itself; one at least.
    What is not shaped goes as fast as the machine copies. `latency` is the longest that a packet may wait to be sent.
    Afterwards nothing is left, whether the block ends, raises, or this process is killed.
    Raises RuntimeError, naming what failed, where the machine cannot do it; see `missing`.
    """
    if not 0 < n <= MOST:
        raise ValueError(f"{n} hosts; expected 1 to {MOST}")
    if own_cores and n > len(USABLE_CPUS):
        raise ValueError(f"{n} hosts with cores of their own; this machine has {len(USABLE_CPUS)} cores")
    with contextlib.ExitStack() as undo:
        switch = start_first("switch")
        undo.callback(end_switch, switch)
        ip(switch.pid, "link", "add", "switch", "type", "bridge")
        ip(switch.pid, "link", "set", "switch", "up")
        hosts = []
        for number in range(n):
            host = Host(f"h{number}", f"{PREFIX}{number + 1}", start_first(f"h{number}"), switch.pid)
            undo.callback(host.down)
            if own_cores:
                os.sched_setaffinity(host.first.pid, select_cores(sorted(USABLE_CPUS), number, n))
            hosts.append(host)
        keys = []
        for host in hosts:
            keys.append(furnish.settle(host.first.pid, host.name, hosts_file(host, hosts, loopback_names)))
            connect(host, rate, latency)
        known = "".join(f"{host.name},{host.address} {key}" for host, key in zip(hosts, keys, strict=True))
        key = furnish.client_key(hosts[0].first.pid)
        for host in hosts:
            # Not on all addresses: nothing shall come in by another way than eth0, but for a host's own name.
            listen = [host.address, *([LOOPBACK_NAME] if loopback_names else [])]
            host.started.append(furnish.open_door(host.first.pid, listen, key, known))
        for host in hosts:
            wait_for_ssh(host)
        yield hosts


def hosts_file(host: Host, hosts: Sequence[Host], loopback_names: bool) -> str:
    """The text of a host's /etc/hosts."""
    lines = ["127.0.0.1 localhost"]
    for other in hosts:
        own = loopback_names and other is host
        lines.append(f"{LOOPBACK_NAME if own else other.address} {other.name}")
    return "\n".join(lines) + "\n"


def connect(host: Host, rate: str | None, latency: str) -> None:
    """Lay the cable from a host's eth0 to the switch, where its end has the host's name."""
    here = host.first.pid
    far = ["peer", "name", "eth0", "netns", str(here)]
    ip(host.switch, "link", "add", host.name, "type", "veth", *far)
    ip(host.switch, "link", "set", host.name, "master", "switch", "up")
    ip(here, "link", "set", "lo", "up")
    ip(here, "address", "add", f"{host.address}/24", "dev", "eth0")
    ip(here, "link", "set", "eth0", "up")
    if rate:
        shape = ["tbf", "rate", rate, "burst", BURST, "latency", latency]
        furnish.do(here, ["tc", "qdisc", "add", "dev", "eth0", "root", *shape], NETWORK)


def ip(first: int, *arguments: str) -> None:
    """Run ip(8) in the network of process `first`; the process ids that it is given are those seen here."""
    furnish.do(first, ["ip", *arguments], NETWORK)


def wait_for_ssh(host: Host) -> None:
    """Return when the host's sshd listens.

    Raises RuntimeError if it has ended, or does not within some seconds.
    """
    until = time.monotonic() + stretch(10)
    while host.address not in furnish.do(host.first.pid, ["ss", "-Htln", "sport", "=", ":22"], NETWORK):
        if host.started[-1].poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"sshd on {host.name}: {furnish.do(host.first.pid, ['sshd', '-t']) or 'no answer'}")
        time.sleep(0.02)


def end_switch(switch: subprocess.Popen[bytes]) -> None:
    """Take the switch away."""
    switch.kill()
    switch.wait(stretch(30))
    close_input(switch)


def close_input(process: subprocess.Popen[bytes]) -> None:
    """Close our end of a first process's pipe, which nobody reads any more."""
    assert process.stdin is not None
    process.stdin.close()


def moves(process: psutil.Process) -> bool:
    """Whether a process is alive and not stopped."""
    still = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)
    try:
        return process.status() not in still
    except psutil.NoSuchProcess:
        return False


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment as it is in a host, and `more`."""
    own = {name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"}
    return {**own, **furnish.ENVIRONMENT, **(more or {})}


def missing() -> str | None:
    """What this machine lacks for a cluster, in words; None if nothing."""
    if os.uname().sysname != "Linux":
        return f"clusters of namespaces need Linux, this is {os.uname().sysname}"
    if os.geteuid() != 0:
        return "clusters of namespaces need root"
    for name, package in PROGRAMS.items():
        if furnish.program(name) is None:
            return f"clusters of namespaces need the program {name} (package {package})"
    try:
        with cluster(1):
            pass
    except (OSError, RuntimeError) as error:
        return f"this machine allows no cluster of namespaces: {error}"
    return None
