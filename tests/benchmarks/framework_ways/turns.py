"""The benchmark's side of `pace`: a way's ranks, which train in turns with those of other ways."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from hvdtrain.launch.launcher import LAUNCHERS
from tests.benchmarks.framework_ways.pace import FOLDER_VARIABLE, done_pipe, go_pipe
from tests.benchmarks.start import ROOT, environment, free_port
from tests.hosts.cluster import Host

LONGEST = 300  # seconds of a turn, at most
# Ranks are stopped between their turns, for longer than Gloo and Horovod would wait for a message.
PATIENT = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "3600", "HOROVOD_STALL_CHECK_DISABLE": "1"}


@dataclass(frozen=True)
class Turn:
    """What rank 0 reported of a turn.

    Attributes:
        seconds: of each step but the first, which finds the caches filled by other ways.
        parts: mean seconds in a step, by name.
    """

    seconds: Sequence[float]
    parts: Mapping[str, float]


class Way:
    """Ranks that train on demand; a context manager that ends them.

    Args:
        name: see `framework_ways.rank`.
        ranks: how many.
        hosts: a host of each; none: this one.
        env: set over this process's environment.
    """

    def __init__(self, name: str, ranks: int, hosts: Sequence[Host] = (), env: Mapping[str, str] = {}) -> None:
        self.name, self._stack = name, contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        pipes = [pipe(self.folder, rank) for pipe in (go_pipe, done_pipe) for rank in range(ranks)]
        for pipe in pipes:
            os.mkfifo(pipe)
        # For reading and writing: to open a pipe would otherwise wait for its other end.
        descriptors = [os.open(pipe, os.O_RDWR) for pipe in pipes]
        self._go, self._done = descriptors[:ranks], descriptors[ranks:]
        for descriptor in self._done:
            self._stack.callback(os.close, descriptor)
        self._output = self._stack.enter_context((self.folder / "output").open("w+"))
        self._process = self._start(ranks, hosts, env)
        self._pids: list[psutil.Process] = []

    def _start(self, ranks: int, hosts: Sequence[Host], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        where = ["-H", ",".join(f"{host.name}:1" for host in hosts), "--network-interfaces", "eth0"] if hosts else []
        line = [LAUNCHERS.get("horovodrun").find_program(), "-np", str(ranks), "--gloo", *where]
        line += [sys.executable, "-m", "tests.benchmarks.framework_ways.rank", self.name]
        master = hosts[0].address if hosts else "127.0.0.1"
        own = {"BENCH_MASTER": master, "BENCH_PORT": str(free_port()), FOLDER_VARIABLE: str(self.folder)}
        environ = environment(hosts) | PATIENT | own | dict(env)
        streams = {"stdin": subprocess.DEVNULL, "stdout": self._output, "stderr": self._output}
        if hosts:
            return hosts[0].popen(line, environ, cwd=ROOT, **streams)
        return subprocess.Popen(line, env=environ, cwd=ROOT, start_new_session=True, **streams)

    def take_turn(self, steps: int) -> Turn:
        """Let the ranks train so many steps and one more. Raises RuntimeError if one ends."""
        for process in self._pids:
            process.resume()
        for descriptor in self._go:
            os.write(descriptor, f"{steps + 1}\n".encode())
        reports = [self._read_report(descriptor) for descriptor in self._done]
        self._pids = find_processes(self.folder)
        for process in self._pids:
            process.suspend()
        seconds, parts = reports[0]["seconds"], reports[0]["parts"]
        return Turn(seconds[1:], {name: whole / len(seconds) for name, whole in parts.items()})

    def _read_report(self, descriptor: int) -> dict:
        text, until = b"", time.monotonic() + LONGEST
        while not text.endswith(b"\n"):
            if select.select([descriptor], [], [], 0.2)[0]:
                text += os.read(descriptor, 1 << 16)
            elif self._process.poll() is not None or time.monotonic() > until:
                self._output.seek(0)
                raise RuntimeError(f"{self.name} ended, or took too long:\n{self._output.read()}")
        return json.loads(text)

    def __enter__(self) -> Way:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        for descriptor in self._go:
            os.close(descriptor)  # which ends the ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        for process in find_processes(self.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._stack.close()


def find_processes(folder: Path) -> list[psutil.Process]:
    """All processes of a way, on whichever host."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(FOLDER_VARIABLE) == str(folder):
                found.append(process)
    return found
