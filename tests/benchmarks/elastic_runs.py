"""Trainings of digits that ranks leave and join, watched: hvdtrain's, stock Horovod's and torchrun's."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.benchmarks.elastic_log import METRICS, RANKS, Seen, Watch
from tests.benchmarks.start import free_port
from tests.ranks.elastic import ElasticJob
from tests.ranks.harness import BIN, Job

PAUSE = 0.05  # seconds
BATCH = 128  # of all ranks
LIMIT = 90.0  # seconds, after which an event has no end
# Hosts that are all this one, for horovodrun too: it starts a worker on 127.0.0.2 by ssh.
NAMES = ("localhost", "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f.0.1", "0177.1")
WORLD = re.compile(r"world     (\d+) ranks?, from step (\d+) on; ranks met in ([\d.]+) s, state in ([\d.]+) s")
TELLING = re.compile(r"error|abort|terminat|exit|what\(\)", re.IGNORECASE)
Found = dict[str, Any]


class Fails(Exception):
    """Training does not go on."""


class Step(NamedTuple):
    """A completed step: when, in a world of what size, and what tells this world from others."""

    at: float
    size: int
    world: Any


def gaps(steps: Sequence[Step]) -> list[float]:
    return [after.at - before.at for before, after in itertools.pairwise(steps)]


class Training:
    """A running training, watched."""

    def __init__(self, job: Job, folder: Path, metrics: Path) -> None:
        self.job, self.folder, self.watch = job, folder, Watch(metrics)
        self.watch.start()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.ended.set()
        self.job.process.kill()  # first, as it may start others in the place of those that end
        while left := self.job.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)

    def steps(self) -> list[Step]:
        return [Step(seen.at, seen.row["size"], seen.row["world"]) for seen in list(self.watch.seen)]

    def worker(self, rank: int) -> psutil.Process:
        """The process that has last said that it is this rank."""
        rows = [json.loads(line) for line in (self.folder / RANKS).read_text().splitlines()]
        return psutil.Process([row["pid"] for row in rows if row["rank"] == rank][-1])

    def said(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def settle(self, size: int, steps: int = 20) -> None:
        """Wait until a world of this size has made some steps."""
        deadline = time.monotonic() + LIMIT
        while True:
            done = self.steps()
            if done and done[-1].size == size and sum(step.world == done[-1].world for step in done) >= steps:
                return
            self.check(deadline)

    def check(self, deadline: float) -> None:
        if self.job.process.poll() is not None:
            telling = [line for line in self.said().splitlines() if TELLING.search(line) and "##hvdtrain" not in line]
            raise Fails(f"aborts: {telling[-1].strip()[:200] if telling else self.said()[-200:]}")
        if time.monotonic() > deadline:
            raise Fails("no step")
        time.sleep(0.02)

    def observe(self, size: int, act: Callable[[], object], *, dies: bool = False, limit: float = LIMIT) -> Found:
        """Do something, and wait for the first step of another world of this size. Raises Fails."""
        before = self.steps()
        world, median = before[-1].world, statistics.median(gaps(before[-21:]))
        began = time.monotonic()
        act()
        while True:
            steps = self.steps()
            others = [i for i in range(len(before), len(steps)) if steps[i].world != world]
            found = next((i for i in others if steps[i].size == size), None)
            if found is not None:
                break
            self.check(began + limit)
        around = steps[len(before) - 1 : found + 1]
        end = steps[found].at
        still = end - began if dies else max(gaps(around)) - median
        result = {"still": still, "after": end - began, "step": median}
        return result | self.parts(began if dies else steps[found - 1].at, end, steps[found].world)

    def parts(self, since: float, end: float, world: Any) -> Found:
        return {}


class Hvdtrain(Training):
    """Sizes of worlds, and what they took to form, are what rank 0 prints."""

    job: ElasticJob

    def worlds(self) -> list[tuple[int, int, float, float]]:
        found = WORLD.findall(self.said())
        return [(int(size), int(step), float(met), float(state)) for size, step, met, state in found]

    def steps(self) -> list[Step]:
        worlds, first = self.worlds(), re.search(r"global = (\d+) rank", self.said())
        sizes = [int(first[1]) if first else 0, *(size for size, *_ in worlds)]

        def placed(seen: Seen) -> Step:
            number = sum(step < seen.row["step"] for _, step, *_ in worlds)
            return Step(seen.at, sizes[number], number)

        return [placed(seen) for seen in list(self.watch.seen)]

    def worker(self, rank: int) -> psutil.Process:
        return self.job.worker(rank)

    def parts(self, since: float, end: float, world: Any) -> Found:
        """What the time consists of; metrics.jsonl is cut between the state's arrival and the first step."""
        *_, met, state = self.worlds()[world - 1]
        again = next((at for at in self.watch.reopened if since < at < end), None)
        if again is None:
            return {}
        detect = again - met - state - since
        return {"parts": {"detect": detect, "rendezvous": met, "sync": state, "recompute": end - again}}


@contextlib.contextmanager
def hvdtrain(ranks: int) -> Iterator[Hvdtrain]:
    often = ["--epochs", "2000", "--eval-every", "1000000", "--checkpoint-every", "1000000"]
    with folder() as path:
        options = ["--pause", str(PAUSE), *often]
        with (
            ElasticJob(path, listed(ranks), *options, least=1, most=ranks) as job,
            Hvdtrain(job, path, job.run_dir / METRICS) as training,
        ):
            training.settle(ranks)
            yield training


@contextlib.contextmanager
def horovod(ranks: int, most: int) -> Iterator[Training]:
    with folder() as path:
        script = path / "discover.sh"
        script.write_text(f'#!/bin/sh\ncat "{path}/hosts"\n')
        script.chmod(0o755)
        list_hosts(path, listed(ranks))
        line = [str(BIN / "horovodrun"), "--gloo", "-np", "1", "--min-np", "1", "--max-np", str(most)]
        line += ["--host-discovery-script", str(script), "--network-interfaces", "lo", sys.executable, "-m"]
        line += ["tests.benchmarks.elastic_stock_rank", str(path), "--batch", str(BATCH // most), "--pause", str(PAUSE)]
        with Job(line, None, path, path / "output") as job, Training(job, path, path / METRICS) as training:
            training.settle(ranks)
            yield training


@contextlib.contextmanager
def torchrun(ranks: int, agents: int) -> Iterator[tuple[Training, Callable[[], object]]]:
    """The training, and what starts an agent more."""
    with folder() as path, contextlib.ExitStack() as jobs:
        line = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "100", "--nproc-per-node"]
        line += [str(ranks // agents), "--nnodes", f"1:{agents}", "--rdzv-backend", "c10d", "--rdzv-id", "1"]
        line += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
        line += ["-m", "tests.benchmarks.elastic_torchrun_rank", str(path), "--pause", str(PAUSE)]

        # Without it, restarted workers did not find each other: Gloo's "Connection refused", again and again.
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

        def start(name: str = "another") -> Job:
            return jobs.enter_context(Job(line, env, path, path / name))

        first = start("output")
        for number in range(1, agents):
            start(str(number))
        with Training(first, path, path / METRICS) as training:
            training.settle(ranks)
            yield training, start


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="recovery-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def listed(ranks: int) -> str:
    return " ".join(f"{name}:1" for name in NAMES[:ranks])


def list_hosts(path: Path, text: str) -> None:
    """What the discovery script prints from now on."""
    (path / "hosts.new").write_text(text.replace(" ", "\n") + "\n")
    (path / "hosts.new").replace(path / "hosts")


def unlist(training: Training, rank: int) -> None:
    """Take a rank's host off the list."""
    environ = training.worker(rank).environ()
    slot = json.loads(environ.get("HVDTRAIN_MEMBER", "{}")).get("slot", {"host": environ["HOROVOD_HOSTNAME"]})
    gone = f"{slot['host']}:1"
    hosts = (training.folder / "hosts").read_text().split()
    list_hosts(training.folder, " ".join(host for host in hosts if host != gone))
