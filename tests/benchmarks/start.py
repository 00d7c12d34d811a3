"""Starting the ranks of a benchmark: on this host, or one on each of several hosts joined by shaped links."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.launch.launcher import LAUNCHERS, bin_folder
from hvdtrain.system.cpus import USABLE_CPUS
from tests.hosts.cluster import Host, cluster, missing

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def machines(rate: str | None, ranks: int) -> Iterator[list[Host]]:
    """The hosts of `ranks` ranks: none, which means this host's loopback, or a host for each where there is a rate.

    rate: what each host can send, as tc writes it (1gbit, 100mbit). Such hosts need root. Each has cores of its own, as
    hosts have, where there are enough.
    """
    if not rate:
        yield []
        return
    if lack := missing():
        raise SystemExit(f"--rate: {lack}")
    with cluster(ranks, rate, own_cores=ranks <= len(USABLE_CPUS)) as hosts:
        yield hosts


def by_horovodrun(
    line: Sequence[str], ranks: int, hosts: Sequence[Host], env: Mapping[str, str], seconds: float
) -> str:
    """Run a command once on each rank, with one thread, by Horovod's own launcher; its output.

    Hosts have equally many ranks.

    env is set over this process's environment. In it goes also where rank 0 can be reached: BENCH_MASTER, BENCH_PORT.
    Raises RuntimeError if a rank fails, subprocess.TimeoutExpired after so many seconds.
    """
    master = hosts[0].address if hosts else "127.0.0.1"
    environ = environment(hosts) | {"BENCH_MASTER": master, "BENCH_PORT": str(free_port())} | dict(env)
    slots = ",".join(f"{host.name}:{ranks // len(hosts)}" for host in hosts)
    where = ["-H", slots, "--network-interfaces", "eth0"] if hosts else []
    return run(
        [LAUNCHERS.get("horovodrun").find_program(), "-np", str(ranks), "--gloo", *where, *line],
        hosts,
        environ,
        seconds,
    )


def by_hvdtrain(arguments: Sequence[str], ranks: int, hosts: Sequence[Host], seconds: float) -> str:
    """Train by `hvdtrain launch`, with one thread a rank; its output. arguments: the recipe and what follows it.

    Raises as `by_horovodrun`.
    """
    where = ["-H", ",".join(f"{host.name}:1" for host in hosts), "--nic", "eth0"] if hosts else []
    line = [sys.executable, "-m", "hvdtrain", "launch", "-np", str(ranks), *where, *arguments, "--threads", "1"]
    return run(line, hosts, environment(hosts), seconds)


def environment(hosts: Sequence[Host]) -> dict[str, str]:
    """This process's environment as ranks want it; only what to add to it where they run on other hosts."""
    path = f"{bin_folder()}{os.pathsep}{os.environ['PATH']}"
    return {**({} if hosts else os.environ), "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(line: Sequence[str], hosts: Sequence[Host], environ: Mapping[str, str], seconds: float) -> str:
    """Run a launcher on the first host, or here, and return what it prints."""
    if hosts:
        done = hosts[0].run(line, environ, timeout=seconds, cwd=ROOT)
    else:
        done = subprocess.run(line, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stdout}\n{done.stderr}")
    return str(done.stdout)


def told(text: str, mark: str = "RESULT") -> Any:
    """What a rank has printed as JSON behind a mark, in what all of them printed."""
    return json.loads(text.split(mark, 1)[1].splitlines()[0])


def free_port() -> int:
    """A TCP port that nobody uses on this host; hosts of a cluster have hardly any in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
