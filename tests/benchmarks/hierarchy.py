"""The time of an exchange if each host encodes its sum once, against the flat one, in turns in one run.

    python -m tests.benchmarks.hierarchy [--hosts 2] [--each 2] [--rate 100mbit] [--turns 5] [--steps 5] [--json FILE]

16 layers of 131,044 gradients (8 MiB) of each rank, from the first one on until all sums are there; no computation but
encoding. The hosts are joined by links of that rate (needs root).

"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from tests.benchmarks.start import by_horovodrun, machines, told
from tests.benchmarks.tables import Table, publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--each", type=int, default=2, help="ranks of a host")
    parser.add_argument("--rate", default="100mbit", help="of the links between hosts: 1gbit, 100mbit, ...")
    parser.add_argument("--specs", default="none,int8,int8@host,bf16,bf16@host")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a turn")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    ranks = options.hosts * options.each
    line = [sys.executable, "-m", "tests.benchmarks.hierarchy_rank", *options.specs.split(",")]
    line += ["--turns", str(options.turns), "--steps", str(options.steps)]
    with machines(options.rate, options.hosts) as hosts:
        result = told(by_horovodrun(line, ranks, hosts, {}, 900))
    rows = []
    for spec, turns in result.items():
        seconds = [turn["seconds"] for turn in turns]
        flat = result.get(spec.partition("@")[0], turns)
        gains = [other["seconds"] / own["seconds"] for own, other in zip(turns, flat, strict=True)]
        spread = f"{min(seconds) * 1e3:.0f}-{max(seconds) * 1e3:.0f}"
        sent = statistics.median(turn["sent"] for turn in turns) / 1e6
        rows.append([spec, f"{statistics.median(seconds) * 1e3:.1f}", spread, f"{statistics.median(gains):.2f}"])
        rows[-1].append(f"{sent:.2f}")
    columns = ["way", "ms", "turns, ms", "x flat", "MB out of a host"]
    caption = f"{options.hosts} hosts x {options.each} ranks, joined at {options.rate}; {options.turns} turns of "
    publish(options.json, [Table(columns, rows, f"{caption}{options.steps} steps")])


if __name__ == "__main__":
    main()
