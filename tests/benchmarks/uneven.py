"""Uneven hosts: `--shares even` against `--shares measured`, and torch's DDP, on ranks that are held to parts of cores.

    python -m tests.benchmarks.uneven [--rounds 2] [--json FILE]      needs root, for control groups

In the first case one rank of two is held to half a core, in the second one of four to 0.2 cores and the others to 0.4,
so that all have the cores that they are given. All train tests/benchmarks/held_recipe.py with the same global batch, in
turns. The time is that of the last steps, after the shares have changed. The aim is 0.9 of what is possible: with
speeds s_r, a step takes as long as the slowest rank, 1 / (n min s_r) of the batch, or 1 / (sum of s_r).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.held_recipe import GROUPS, Held
from tests.benchmarks.start import free_port
from tests.benchmarks.tables import Table, publish
from tests.support.cpu import core_quota

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "benchmarks" / "held_recipe.py"
CASES = {"2 ranks, one at half a core": (1.0, 0.5), "4 ranks at 0.4 cores, one at 0.2": (0.4, 0.4, 0.4, 0.2)}
WAYS = ("even", "measured", "DDP")
STEPS = {"even": 20, "measured": 40}
COUNTED_STEPS = 14  # the last ones


@contextlib.contextmanager
def held_ranks(cores: Sequence[float]) -> Iterator[dict[str, str]]:
    """Make a control group for each rank, and give the environment in which the recipe enters them."""
    with contextlib.ExitStack() as undo:
        groups = [undo.enter_context(core_quota(one, f"{os.getpid()}-{rank}")) for rank, one in enumerate(cores)]
        meeting = {"BENCH_MASTER": "127.0.0.1", "BENCH_PORT": str(free_port())}  # of tests.benchmarks.ddp_rank
        yield os.environ | meeting | {GROUPS: ":".join(map(str, groups)), "OMP_NUM_THREADS": "1"}


def measure(way: str, cores: Sequence[float]) -> tuple[float, Sequence[int]]:
    """The mean seconds of the last steps, and the shares at the end."""
    launch = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", str(len(cores)), sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder, held_ranks(cores) as env:
        run = Path(folder) / "run"
        if way == "DDP":
            command = [*launch, "tests.benchmarks.ddp_rank", str(RECIPE), "--eval-every", "1000000"]
        else:
            command = [*launch, "hvdtrain", "train", str(RECIPE), "--run-dir", str(run), "--shares", way]
            command += ["--steps", str(STEPS[way]), "--log-every", "1", "--threads", "1"]
        done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
        if way == "DDP":
            result = next(line for line in done.stdout.splitlines() if "RESULT" in line)
            seconds = json.loads(result.partition("RESULT")[2])["seconds"]
            return statistics.fmean(seconds[-COUNTED_STEPS:]), ()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shares = json.loads((run / "summary.json").read_text())["shares"]
        return statistics.fmean(Held.batch_size / row["samples_per_second"] for row in rows[-COUNTED_STEPS:]), shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    rows = []
    for name, cores in CASES.items():
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        dealt = ""
        for turn in range(options.rounds):
            for way in WAYS if turn % 2 == 0 else reversed(WAYS):
                taken, shares = measure(way, cores)
                seconds[way].append(taken)
                dealt = ":".join(map(str, shares)) if way == "measured" else dealt
                print(f"{name}: {way} {1000 * taken:.1f} ms a step, shares {shares}", file=sys.stderr, flush=True)
        even, measured, ddp = (statistics.median(seconds[way]) for way in WAYS)
        gain = statistics.median(a / b for a, b in zip(seconds["even"], seconds["measured"], strict=True))
        ideal = sum(cores) / (len(cores) * min(cores))
        times = [f"{1000 * value:.0f}" for value in (even, measured, ddp)]
        rows.append(
            [name, *times, dealt, f"{gain:.2f}", f"{ideal:.2f}", f"{gain / ideal:.2f}", f"{ddp / measured:.2f}"]
        )
    columns = ["", "even", "measured", "DDP", "shares", "even / measured", "ideal", "of ideal", "DDP / measured"]
    publish(options.json, [Table(columns, rows, "Milliseconds a step")])


if __name__ == "__main__":
    main()
