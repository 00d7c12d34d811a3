"""Rounds of local steps against an exchange in each step, plain and compressed: time of a step and accuracy.

    python -m tests.benchmarks.local_steps time [--rates 100mbit 10mbit] [--ways sync local:16 ...] [--steps 64]
    python -m tests.benchmarks.local_steps accuracy [--ways ...] [--seeds 0 1 2] [--epochs 20]

digits with 0.32 MB of weights, in batches of 90, so that an epoch has 16 steps, on 4 ranks (or --ranks) with one thread
each: "time" on as many hosts joined by links of these rates (needs root), "accuracy" on this host. A way is one of
`WAYS`. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.start import ROOT, by_hvdtrain, machines
from tests.hosts.cluster import Host

RECIPE, BATCH, LONGEST, NEVER = ROOT / "recipes" / "digits.py", 90, 1200, "1000000000"
WAYS = {
    "sync": [],
    "powersgd:4": ["--compression", "powersgd:4,min=64,warmup=0"],
    "local:16": ["--local-steps", "16"],
    "local:16 int8": ["--local-steps", "16", "--compression", "int8"],
    "post-local:16": ["--local-steps", "16", "--local-after", "25%"],
    "diloco:16": ["--local-steps", "16", "--outer", "nesterov:0.7,0.9"],
}


def train(way: str, ranks: int, hosts: Sequence[Host], *more: str) -> dict[str, Any]:
    """Train; the summary."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        line = [
            str(RECIPE),
            "--width",
            "64",
            "--batch-size",
            str(BATCH),
            "--run-dir",
            str(run),
            "--quiet",
            *WAYS[way],
            *more,
        ]
        by_hvdtrain([*line, "--checkpoint-every", NEVER, "--eval-every", NEVER], ranks, hosts, LONGEST)
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def measure_times(options: argparse.Namespace) -> list[list[str]]:
    """Return the rows of the ways: milliseconds a step on average, and as many times faster than the first."""
    rows: dict[str, list[str]] = {way: [way] for way in options.ways}
    for rate in options.rates:
        with machines(rate, options.ranks) as hosts:
            first = 0.0
            for way in options.ways:
                summary = train(way, options.ranks, hosts, "--steps", str(options.steps))
                milliseconds = BATCH / summary["samples_per_second"] * 1e3
                first = first or milliseconds
                rows[way] += [f"{milliseconds:.1f}", f"{first / milliseconds:.1f}"]
                if rate == options.rates[-1]:
                    rows[way].append(str(summary["wire_bytes_per_step"]))
                print(way, rate, rows[way], flush=True)
    return list(rows.values())


def measure_accuracies(options: argparse.Namespace) -> list[list[str]]:
    """Return the rows of the ways: the mean of the final accuracies in percent, and each."""
    rows = []
    for way in options.ways:
        more = ["--epochs", str(options.epochs)]
        found = [
            100 * train(way, options.ranks, [], *more, "--seed", str(seed))["eval"]["accuracy"]
            for seed in options.seeds
        ]
        rows.append([way, f"{statistics.fmean(found):.2f}", " ".join(f"{one:.2f}" for one in found)])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "accuracy"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rates", nargs="+", default=["100mbit", "10mbit"])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    if options.what == "time":
        rows, columns = measure_times(options), ["way"]
        columns += [text for rate in options.rates for text in (f"ms at {rate}", "times as fast")] + ["bytes a step"]
    else:
        rows, columns = measure_accuracies(options), ["way", "accuracy, %", "by seed"]
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
