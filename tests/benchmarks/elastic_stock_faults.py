"""What Horovod's own elastic mode does at each fault of docs/faults.md that can be planted on one host.

    python -m tests.benchmarks.elastic_stock_faults [--faults kill,stop,...] [--limit 90] [--results F] [--json F]

Three workers, each on a host of its own, train digits for 8 epochs by tests/benchmarks/elastic_stock_faults_rank.py. Of
each fault it says whether the run finished, ended or had no end within the limit; how many ids of all epochs no
committed step consumed, and how many more than one did; and how many processes were left when horovodrun had ended.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.elastic_runs import NAMES, folder, list_hosts, listed
from tests.benchmarks.elastic_stock_faults_rank import EPOCHS, EXAMPLES
from tests.benchmarks.tables import Table, publish
from tests.ranks.disk import small_disk
from tests.ranks.harness import BIN, ROOT, Job

ENDING = 5.0  # seconds for what is left when horovodrun has ended
Found = dict[str, Any]


class Stock:
    """A running job of three workers."""

    def __init__(self, path: Path, job: Job, limit: float) -> None:
        self.path, self.job = path, job
        self.deadline = time.monotonic() + limit

    def rows(self) -> list[Found]:
        texts = [file.read_text() for file in self.path.glob("ids-*.jsonl")]
        return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps(self, number: int) -> None:
        """Wait for that many more steps, or for the end."""
        before = None
        while self.alive():
            done = max((row["step"] for row in self.rows()), default=0)
            before = done if before is None else before
            if done >= before + number:
                return
            time.sleep(0.05)

    def alive(self) -> bool:
        return self.job.process.poll() is None and time.monotonic() < self.deadline

    def sizes(self) -> list[int]:
        """The sizes of the worlds, one after the other; equal ones in turn are one."""
        path = self.path / "ranks.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [size for size, _ in itertools.groupby(row["size"] for row in rows)]

    def worker(self, rank: int) -> psutil.Process:
        rows = [json.loads(line) for line in (self.path / "ranks.jsonl").read_text().splitlines()]
        return psutil.Process([row["pid"] for row in rows if row["rank"] == rank][-1])

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        for process in [self.worker(rank) for rank in ranks]:
            process.send_signal(number)

    def hosts(self, text: str) -> None:
        list_hosts(self.path, text)

    def fault(self, what: str) -> None:
        (self.path / "fault").write_text(what)

    def discovery(self, script: str) -> None:
        (self.path / "discover.sh").write_text(f"#!/bin/sh\n{script}\n")


def added_and_removed(job: Stock) -> None:
    job.hosts(f"{listed(2)} {NAMES[3]}:1")


def come_and_go(job: Stock) -> None:
    job.hosts(listed(2))
    time.sleep(8)
    job.hosts(listed(3))


def newcomer(what: str) -> Callable[[Stock], None]:
    def come(job: Stock) -> None:
        job.fault(what)
        job.hosts(listed(4))

    return come


def flapping(job: Stock) -> None:
    for _ in range(4):
        job.hosts(listed(2))
        time.sleep(1.5)
        job.hosts(listed(3))
        time.sleep(1.5)


def driver(job: Stock) -> None:
    job.job.process.kill()


@dataclass(frozen=True)
class Fault:
    """What is done to a job, on which hosts it begins, and with how many workers at least it runs."""

    plant: Callable[[Stock], object]
    least: int = 1
    hosts: str = listed(3)


ONE_HOST = f"{NAMES[0]}:3"
FAULTS = {
    "none": Fault(lambda job: None),
    "kill": Fault(lambda job: job.kill(1)),
    "kill-rank-0": Fault(lambda job: job.kill(0)),
    "kill-two": Fault(lambda job: job.kill(1, 2)),
    "kill-all": Fault(lambda job: job.kill(0, 1, 2)),
    "kill-one-host": Fault(lambda job: job.kill(1), hosts=ONE_HOST),
    "kill-rank-0-one-host": Fault(lambda job: job.kill(0), hosts=ONE_HOST),
    "stop": Fault(lambda job: job.kill(1, number=signal.SIGSTOP)),
    "stop-rank-0": Fault(lambda job: job.kill(0, number=signal.SIGSTOP)),
    "driver": Fault(driver),
    "added": Fault(lambda job: job.hosts(listed(4))),
    "removed": Fault(lambda job: job.hosts(listed(2))),
    "added-and-removed": Fault(added_and_removed),
    "unreachable": Fault(lambda job: job.hosts(f"{listed(3)} 203.0.113.9:1")),
    "newcomer-crashes": Fault(newcomer("init-crash")),
    "newcomer-hangs": Fault(newcomer("init-hang")),
    "newcomer-crashes-late": Fault(newcomer("late-crash")),
    "newcomer-hangs-late": Fault(newcomer("late-hang")),
    "discovery-fails": Fault(lambda job: job.discovery("exit 1")),
    "discovery-hangs": Fault(lambda job: (job.discovery("sleep 600"), time.sleep(3), job.kill(1))),
    "discovery-junk": Fault(lambda job: job.discovery("echo '?!'")),
    "discovery-nothing": Fault(lambda job: job.discovery("true")),
    "discovery-flaps": Fault(flapping),
    "too-few-then-back": Fault(come_and_go, 3),
    "notice": Fault(lambda job: job.kill(1, number=signal.SIGTERM)),
    "bug": Fault(lambda job: job.fault("score-always")),
    "disk-full": Fault(lambda job: None),
}
TELLING = re.compile(r"error|abort|terminat|exception|what\(\)", re.IGNORECASE)


@contextlib.contextmanager
def start(path: Path, fault: Fault, limit: float, wheel: Path | None) -> Iterator[Stock]:
    """A job that has made some steps, and of which nothing is left afterwards."""
    (path / "discover.sh").write_text(f'#!/bin/sh\ncat "{path}/hosts"\n')
    (path / "discover.sh").chmod(0o755)
    list_hosts(path, fault.hosts)
    line = [str(BIN / "horovodrun"), "--gloo", "-np", "3", "--min-np", str(fault.least), "--max-np", "4"]
    line += ["--host-discovery-script", str(path / "discover.sh"), "--network-interfaces", "lo", sys.executable]
    line += ["-m", "tests.benchmarks.elastic_stock_faults_rank", str(path)]
    env = {}
    if wheel:  # which looks for the libraries of MPI and NCCL relative to itself
        libraries = (Path(sys.prefix) / "lib", Path(sysconfig.get_path("purelib")) / "nvidia" / "nccl" / "lib")
        env["PYTHONPATH"] = f"{wheel}{os.pathsep}{ROOT}"
        env["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, [*libraries, os.environ.get("LD_LIBRARY_PATH", "")]))
    with Job(line, env, path, path / "output") as horovodrun:
        job = Stock(path, horovodrun, 3 * limit)
        job.steps(5)
        yield job
        horovodrun.process.kill()
        for process in horovodrun.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def observe(name: str, limit: float, wheel: Path | None) -> Found:
    """Plant a fault after some steps, and say what comes of it."""
    fault = FAULTS[name]
    with folder() as path, contextlib.ExitStack() as closing:
        if name == "disk-full":
            closing.enter_context(small_disk(path / "disk", 1)).fill()
        with start(path, fault, limit, wheel) as job:
            began = time.time()
            fault.plant(job)
            job.deadline = time.monotonic() + limit
            while job.alive():
                time.sleep(0.1)
            code = job.job.process.poll()
            deadline = time.monotonic() + ENDING
            while code is not None and job.job.processes() and time.monotonic() < deadline:
                time.sleep(0.1)
            left = len(job.job.processes()) if code is not None else 0
        said = [text for text in (path / "output").read_text(errors="replace").splitlines() if TELLING.search(text)]
        finished = (path / "finished").exists()
        return {
            "outcome": "no end" if code is None else "finished" if finished and code == 0 else f"exit {code}",
            "trained to the end": finished,
            "worlds": job.sizes(),
            **count_visits(job.rows(), began, finished),
            "same weights": have_same_weights(path) if finished else None,
            "left": left,
            "said": said[-1].strip()[:160] if said and code != 0 else "",
        }


def count_visits(rows: Sequence[Found], began: float, finished: bool) -> Found:
    """Count what the weights have consumed: what the last try of each step did, over all ranks.

    An id that is repeated in the last step of an epoch fills up the batches of the last ranks: it is padding.
    """
    last_try: dict[int, float] = {}
    last_step: dict[int, int] = {}
    for row in rows:
        last_try[row["step"]] = max(row["world"], last_try.get(row["step"], 0))
        last_step[row["epoch"]] = max(row["step"], last_step.get(row["epoch"], 0))
    visits: collections.Counter[tuple[int, int]] = collections.Counter()
    padded = 0
    for row in sorted(rows, key=lambda row: row["step"]):
        if row["world"] == last_try[row["step"]]:
            for i in row["ids"]:
                padded += visits[row["epoch"], i] > 0 and row["step"] == last_step[row["epoch"]]
                visits[row["epoch"], i] += 1
    times = sorted(row["at"] for row in rows)
    return {
        "still": max((after - before for before, after in itertools.pairwise(times) if after > began), default=None),
        "lost": EPOCHS * EXAMPLES - len(visits) if finished else None,
        "repeated": sum(visits.values()) - len(visits) - padded,
        "padded": padded,
    }


def have_same_weights(path: Path) -> bool:
    """Return whether all ranks ended with the same weights."""
    return len({json.loads(line)["sum"] for line in (path / "weights.jsonl").read_text().splitlines()}) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=lambda text: text.split(","), default=list(FAULTS))
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a run has no end")
    parser.add_argument("--results", type=Path, help="file for what was found; what is in it of other faults is kept")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    parser.add_argument("--wheel", type=Path, help="another wheel of Horovod than the one that is installed")
    options = parser.parse_args()
    if strange := set(options.faults) - set(FAULTS):
        parser.error(f"--faults: {', '.join(strange)} is none of {', '.join(FAULTS)}")
    found = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    with contextlib.ExitStack() as closing:
        wheel = None
        if options.wheel:
            wheel = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="horovod-")))
            zipfile.ZipFile(options.wheel).extractall(wheel)
        for name in options.faults:
            found[name] = observe(name, options.limit, wheel)
            print(name, found[name], file=sys.stderr, flush=True)
            if options.results:
                options.results.write_text(json.dumps(found, indent=1) + "\n")
    rows = []
    for name, one in found.items():
        outcome = one["outcome"] + " after training" * (one["trained to the end"] and one["outcome"] != "finished")
        still = "" if one["still"] is None else f"{one['still']:.1f}"
        cells = [outcome, one["worlds"], still, one["lost"], one["repeated"], one["padded"], one["same weights"]]
        rows.append([name, *map(str, [*cells, one["left"], one["said"].replace("|", "/")])])
    columns = ["fault", "outcome", "worlds", "longest pause, s", "ids lost", "repeated", "padded", "same weights"]
    caption = f"Of {EPOCHS} x {EXAMPLES} examples; no end: within {options.limit:g} s of the fault"
    publish(options.json, [Table([*columns, "processes left", "printed last"], rows, caption)])


if __name__ == "__main__":
    main()
