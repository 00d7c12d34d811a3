"""How long it takes from the command to the first step on several hosts: `hvdtrain launch` against bare horovodrun.

    python -m tests.benchmarks.start_up [--rounds 5] [--hosts 4] [--rate 1gbit]

Each starts the same training of digits, a rank with one thread on each host (needs root), and the time counts until the
first row of its metrics is there. Ways take turns, and each round begins with another: launch as a user types it;
horovodrun told of the network interface, as launch tells it; horovodrun left to find it. What horovodrun remembers of
hosts for an hour is forgotten before each turn. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.start import ROOT, environment, machines
from tests.benchmarks.tables import Table, publish
from tests.hosts import furnish
from tests.hosts.cluster import Host

LONGEST = 300  # seconds of a run
HVDTRAIN = [sys.executable, "-m", "hvdtrain"]
HOROVODRUN = [str(Path(sys.executable).with_name("horovodrun")), "--gloo"]


def lines(hosts: Sequence[Host]) -> dict[str, list[str]]:
    """What stands before the recipe, for each way."""
    where = ["-np", str(len(hosts)), "-H", ",".join(f"{host.name}:1" for host in hosts)]
    nic = ["--network-interfaces", "eth0"]
    return {
        "hvdtrain launch": [*HVDTRAIN, "launch", *where],
        "horovodrun --network-interfaces": [*HOROVODRUN, *where, *nic, *HVDTRAIN, "train"],
        "horovodrun": [*HOROVODRUN, *where, *HVDTRAIN, "train"],
    }


def seconds_to_first_step(line: Sequence[str], hosts: Sequence[Host]) -> float:
    """Run a command line to its end; how long it took to the first step. Raises RuntimeError if it fails."""
    shutil.rmtree(furnish.root(hosts[0].first.pid) / "run/home/.horovod", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        run = Path(folder) / "run"
        options = ["--steps", "1", "--log-every", "1", "--threads", "1", "--run-dir", str(run)]
        begin = time.monotonic()
        process = hosts[0].popen(
            [*line, str(ROOT / "recipes" / "digits.py"), *options],
            environment(hosts),
            cwd=ROOT,
            stdout=said,
            stderr=said,
        )
        rows = run / "metrics.jsonl"
        while process.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.005)
            if time.monotonic() > begin + LONGEST:
                process.terminate()
        taken = time.monotonic() - begin
        if process.wait(LONGEST) != 0 or not rows.exists():
            said.seek(0)
            raise RuntimeError(f"{' '.join(line)} ended with code {process.returncode}:\n{said.read()}")
        hosts[0].started.remove(process)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="what each host can send, as tc writes it")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    taken: dict[str, list[float]] = {}
    with machines(options.rate, options.hosts) as hosts:
        for number in range(options.rounds):
            ways = list(lines(hosts).items())
            turn = number % len(ways)
            for name, line in ways[turn:] + ways[:turn]:
                taken.setdefault(name, []).append(seconds_to_first_step(line, hosts))
                print(f"round {number + 1}: {name}: {taken[name][-1]:.2f} s", file=sys.stderr)
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    caption = f"Seconds from the command to the first step, {options.hosts} hosts, {options.rounds} rounds."
    rows = []
    for name in lines([]):
        ratio = median[name] / median["horovodrun --network-interfaces"]
        values = (median[name], min(taken[name]), max(taken[name]), ratio)
        rows.append([name, *(f"{value:.2f}" for value in values)])
    columns = ["way", "median", "least", "most", "against horovodrun --network-interfaces"]
    publish(options.json, [Table(columns, rows, caption)])


if __name__ == "__main__":
    main()
