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
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.elastic_runs import NAMES, folder, list_hosts, listed
from tests.benchmarks.elastic_stock_faults_rank import EPOCHS, EXAMPLES
from tests.benchmarks.tables import Table, publish
from tests.ranks.disk import small_disk
from tests.ranks.harness import BIN, Job

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
        """Wait for so many more steps of a rank 0, or for the end."""
        before = None
        while self.alive():
            done = sum(row["rank"] == 0 for row in self.rows())
            before = done if before is None else before
            if done >= before + number:
                return
            time.sleep(0.05)

    def alive(self) -> bool:
        return self.job.process.poll() is None and time.monotonic() < self.deadline

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


# What happens; and --min-np.
FAULTS: dict[str, tuple[Callable[[Stock], object], int]] = {
    "none": (lambda job: None, 1),
    "kill": (lambda job: job.kill(1), 1),
    "kill-rank-0": (lambda job: job.kill(0), 1),
    "kill-two": (lambda job: job.kill(1, 2), 1),
    "kill-all": (lambda job: job.kill(0, 1, 2), 1),
    "stop": (lambda job: job.kill(1, number=signal.SIGSTOP), 1),
    "driver": (driver, 1),
    "added": (lambda job: job.hosts(listed(4)), 1),
    "removed": (lambda job: job.hosts(listed(2)), 1),
    "added-and-removed": (added_and_removed, 1),
    "unreachable": (lambda job: job.hosts(f"{listed(3)} 203.0.113.9:1"), 1),
    "newcomer-crashes": (newcomer("init-crash"), 1),
    "newcomer-hangs": (newcomer("init-hang"), 1),
    "discovery-fails": (lambda job: job.discovery("exit 1"), 1),
    "discovery-hangs": (lambda job: (job.discovery("sleep 600"), time.sleep(3), job.kill(1)), 1),
    "discovery-junk": (lambda job: job.discovery("echo '?!'"), 1),
    "discovery-nothing": (lambda job: job.discovery("true"), 1),
    "discovery-flaps": (flapping, 1),
    "too-few-then-back": (come_and_go, 3),
    "notice": (lambda job: job.kill(1, number=signal.SIGTERM), 1),
    "bug": (lambda job: job.fault("score-always"), 1),
    "disk-full": (lambda job: None, 1),
}
TELLING = re.compile(r"error|abort|terminat|exception|what\(\)", re.IGNORECASE)


def observe(name: str, limit: float) -> Found:
    """Plant a fault after some steps, and say what comes of it."""
    plant, least = FAULTS[name]
    with folder() as path, contextlib.ExitStack() as closing:
        (path / "discover.sh").write_text(f'#!/bin/sh\ncat "{path}/hosts"\n')
        (path / "discover.sh").chmod(0o755)
        list_hosts(path, listed(3))
        if name == "disk-full":
            closing.enter_context(small_disk(path / "disk", 1)).fill()
        line = [str(BIN / "horovodrun"), "--gloo", "-np", "3", "--min-np", str(least), "--max-np", "4"]
        line += ["--host-discovery-script", str(path / "discover.sh"), "--network-interfaces", "lo", sys.executable]
        line += ["-m", "tests.benchmarks.elastic_stock_faults_rank", str(path)]
        with Job(line, None, path, path / "output") as horovodrun:
            job = Stock(path, horovodrun, 3 * limit)
            job.steps(5)
            plant(job)
            job.deadline = time.monotonic() + limit
            while job.alive():
                time.sleep(0.1)
            code = horovodrun.process.poll()
            deadline = time.monotonic() + ENDING
            while code is not None and horovodrun.processes() and time.monotonic() < deadline:
                time.sleep(0.1)
            left = len(horovodrun.processes()) if code is not None else 0
            horovodrun.process.kill()
            for process in horovodrun.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        said = [text for text in (path / "output").read_text(errors="replace").splitlines() if TELLING.search(text)]
        finished = (path / "finished").exists()
        visits = collections.Counter((row["epoch"], i) for row in job.rows() for i in row["ids"])
        worlds = [json.loads(line)["size"] for line in (path / "ranks.jsonl").read_text().splitlines()]
        return {
            "outcome": "no end" if code is None else "finished" if finished and code == 0 else f"exit {code}",
            "trained to the end": finished,
            "worlds": [size for size, _ in itertools.groupby(worlds)],
            "lost": EPOCHS * EXAMPLES - len(visits) if finished else None,
            "repeated": sum(count > 1 for count in visits.values()),
            "left": left,
            "said": said[-1].strip()[:160] if said and code != 0 else "",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=lambda text: text.split(","), default=list(FAULTS))
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a run has no end")
    parser.add_argument("--results", type=Path, help="file for what was found; what is in it of other faults is kept")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    if strange := set(options.faults) - set(FAULTS):
        parser.error(f"--faults: {', '.join(strange)} is none of {', '.join(FAULTS)}")
    found = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    for name in options.faults:
        found[name] = observe(name, options.limit)
        print(name, found[name], file=sys.stderr, flush=True)
        if options.results:
            options.results.write_text(json.dumps(found, indent=1) + "\n")
    rows = []
    for name, one in found.items():
        outcome = one["outcome"] + " after training" * (one["trained to the end"] and one["outcome"] != "finished")
        cells = [outcome, one["worlds"], one["lost"], one["repeated"], one["left"], one["said"].replace("|", "/")]
        rows.append([name, *map(str, cells)])
    columns = ["fault", "outcome", "worlds", "ids lost", "repeated", "processes left", "printed last"]
    caption = f"Of {EPOCHS} x {EXAMPLES} examples; no end: within {options.limit:g} s of the fault"
    publish(options.json, [Table(columns, rows, caption)])


if __name__ == "__main__":
    main()
