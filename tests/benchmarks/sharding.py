"""Step time and optimizer state of `--shard optimizer` against the plain step and torch's ways, in turns in one run.

    python -m tests.benchmarks.sharding [--ranks 2] [--rate 1gbit] [--turns 3] [--steps 8] [--json FILE]

plain (hvdtrain without shards), shard, ddp, ddp-zero (ZeroRedundancyOptimizer), fsdp2 (per layer group): ResNet-18
with group norm, AdamW, 16 images of 64x64 per rank, one thread each; on this host, or with --rate each on a host of its
own, joined by links of that rate (needs root).
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
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", help="of the links between hosts: 1gbit, 100mbit, ...; default: loopback")
    parser.add_argument("--ways", default="plain,shard,ddp,ddp-zero,fsdp2")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps a turn")
    parser.add_argument("--images", type=int, default=16, help="per rank")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    line = [sys.executable, "-m", "tests.benchmarks.sharding_rank", options.ways]
    line += ["--turns", str(options.turns), "--steps", str(options.steps), "--images", str(options.images)]
    with machines(options.rate, options.ranks) as hosts:
        result = told(by_horovodrun(line, options.ranks, hosts, {}, 900))
    medians = {way: [statistics.median(turn) for turn in turns] for way, turns in result["seconds"].items()}
    rows = []
    for way, found in medians.items():
        # Of the same turn: what else the machine does changes.
        ratio = statistics.median(own / plain for own, plain in zip(found, medians["plain"], strict=True))
        state = result["state_bytes"][way] / 2**20
        spread = f"{min(found) * 1e3:.0f}-{max(found) * 1e3:.0f}"
        rows.append([way, f"{statistics.median(found) * 1e3:.1f}", spread, f"{ratio:.2f}", f"{state:.1f}"])
    where = f"hosts joined at {options.rate}" if options.rate else "loopback"
    caption = f"{options.ranks} ranks, {where}; {options.turns} turns of {options.steps} steps"
    publish(options.json, [Table(["way", "ms", "turns, ms", "of plain", "state, MiB"], rows, caption)])


if __name__ == "__main__":
    main()
