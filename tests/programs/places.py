"""Where programs are launched: this host, two hosts over ssh, and two hosts in a job of each batch system."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.hosts.cluster import Host, cluster
from tests.ranks.harness import BIN, HVDTRAIN
from tests.slurm.cluster import slurm
from tests.support.limits import stretch

MARK = "HVDTRAIN_TEST_MARK"


class Started:
    """A launch that runs; its output is in a file, which is read as it grows."""

    def __init__(self, place: Place, command: Sequence[str], folder: Path) -> None:
        self.place = place
        self.mark = uuid.uuid4().hex
        self.said = folder / "said"
        self.before = {process.pid for host in place.hosts for process in host.processes()}
        own = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", MARK: self.mark, **place.env}
        with self.said.open("w") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, "cwd": folder}
            if place.hosts:
                self.process = place.hosts[0].popen(command, own, **options)
            else:
                self.process = subprocess.Popen(command, env={**os.environ, **own}, **options)  # type: ignore[call-overload]

    def output(self) -> str:
        return self.said.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float) -> bool:
        """Whether the launch has printed a text within some seconds, before its end."""
        until = time.monotonic() + stretch(seconds)
        while text not in self.output():
            if time.monotonic() > until or self.process.poll() is not None:
                return False
            time.sleep(0.05)
        return True

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if it does not end."""
        try:
            return int(self.process.wait(stretch(seconds)))
        except subprocess.TimeoutExpired:
            return None

    def interrupt(self) -> None:
        """Press Ctrl-C: salloc, too, leaves it to the command that it runs."""
        launch = psutil.Process(self.process.pid)
        if self.place.wrapper:
            (launch,) = (child for child in launch.children(recursive=True) if child.cmdline()[1:4] == LAUNCH[1:])
        launch.send_signal(signal.SIGINT)

    def left_over(self, seconds: float = 5) -> list[str]:
        """What still runs some seconds after the end."""
        until = time.monotonic() + seconds
        while (left := self.running()) and time.monotonic() < until:
            time.sleep(0.05)
        return [" ".join(process.cmdline()) for process in left if process.is_running()]

    def running(self) -> list[psutil.Process]:
        """The processes of this launch: on hosts, those that were not there before."""
        if self.place.hosts:
            there = [process for host in self.place.hosts for process in host.processes()]
            return [process for process in there if process.pid not in self.before and not of_the_place(process)]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


LAUNCH = [*HVDTRAIN, "launch"]


def of_the_place(process: psutil.Process) -> bool:
    """Whether it belongs to sshd or Slurm, which end in their own time, or has ended."""
    try:
        return process.name() in {"sshd", "sshd-session", "slurmstepd", "munged", "slurmctld", "slurmd"}
    except psutil.NoSuchProcess:
        return True


@dataclass
class Place:
    """Two ranks on this host, or one on each of two hosts."""

    options: list[str]  # of launch
    hosts: list[Host] = field(default_factory=list)  # none: this host
    env: dict[str, str] = field(default_factory=dict)
    wrapper: list[str] = field(default_factory=list)  # what runs launch in a job
    discovery: str = ""  # a shell command that prints the hosts of an elastic launch; "": `elastic_source` has them
    elastic_source: list[str] | None = None  # options of launch; None without `discovery`: nothing elastic here

    @property
    def nodes(self) -> int:
        return len(self.hosts) or 1

    @property
    def host_of_rank_1(self) -> str:
        return "h1" if self.hosts else socket.gethostname()

    @property
    def elastic(self) -> bool:
        return bool(self.discovery or self.elastic_source)

    @contextlib.contextmanager
    def start(self, line: Sequence[str], *, elastic: bool) -> Iterator[Started]:
        """Launch a program; what is left of it is killed at the end."""
        with tempfile.TemporaryDirectory(prefix="hvdtrain-programs-") as name:
            options = ["--elastic", "--min-np", "1", *(self.elastic_source or [])] if elastic else self.options
            if elastic and self.discovery:
                script = Path(name) / "hosts.sh"
                script.write_text(f"#!/bin/sh\n{self.discovery}\n")
                script.chmod(0o755)
                options += ["--discovery", str(script)]
            started = Started(self, [*self.wrapper, *LAUNCH, *options, *line], Path(name))
            try:
                yield started
            finally:
                for process in started.running():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                started.process.wait(stretch(30))
                if self.hosts and started.process in self.hosts[0].started:
                    self.hosts[0].started.remove(started.process)


@contextlib.contextmanager
def local(*options: str, discovery: str = "") -> Iterator[Place]:
    yield Place(["-np", "2", *options], discovery=discovery)


@contextlib.contextmanager
def ssh() -> Iterator[Place]:
    with cluster(2) as hosts:
        yield Place(["-H", "h0:1,h1:1"], hosts, discovery="printf 'h0:1\\nh1:1\\n'")


@contextlib.contextmanager
def slurm_job() -> Iterator[Place]:
    with cluster(2) as hosts, slurm(hosts):
        job = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1"]
        yield Place(["--launcher", "srun"], hosts, wrapper=job, elastic_source=["--from", "slurm"])


@contextlib.contextmanager
def node_file(system: str, variable: str, text: str) -> Iterator[Place]:
    """A job of a batch system: it has a file with its hosts, and a variable names the file."""
    with cluster(2) as hosts, tempfile.TemporaryDirectory(prefix="hvdtrain-programs-") as folder:
        path = Path(folder) / "nodes"
        path.write_text(text)
        source = ["--from", system]
        yield Place(source, hosts, {variable: str(path)}, elastic_source=source)


SGE_HOSTS = "h0 1 all.q@h0 UNDEFINED\nh1 1 all.q@h1 UNDEFINED\n"
PLACES: dict[str, Callable[[], AbstractContextManager[Place]]] = {
    "this host": functools.partial(local, discovery="echo localhost:2"),
    "this host, mpirun": functools.partial(local, "--launcher", "mpirun"),
    "two hosts, ssh": ssh,
    "Slurm, srun": slurm_job,
    "PBS": functools.partial(node_file, "pbs", "PBS_NODEFILE", "h0\nh1\n"),
    "LSF": functools.partial(node_file, "lsf", "LSB_DJOB_HOSTFILE", "h0\nh1\n"),
    "SGE": functools.partial(node_file, "sge", "PE_HOSTFILE", SGE_HOSTS),
}
