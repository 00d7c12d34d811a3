"""Step time of `--shard model` on two hosts of two ranks against torch's FSDP2 over all four, and its HSDP.

    python -m tests.benchmarks.hybrid [--rate 1gbit] [--turns 3] [--steps 6] [--ways hybrid,fsdp2] [--json FILE]

hybrid (FSDP2 within a host, hvdtrain's exchange between the two), hybrid-int8 (the same with --compression int8), fsdp2
(fully sharded over all ranks), hsdp (FSDP2 on a mesh of hosts x ranks): ResNet-18 with group norm, AdamW, 4 images of
64x64 per rank, one thread each. A turn starts each way once, as processes of its own. Links have the rate, or are this
host's loopback with --rate ''. Needs root, but for loopback.
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
    parser.add_argument("--rate", default="1gbit", help="of the link between the hosts; '': loopback")
    parser.add_argument("--ways", default="hybrid,hybrid-int8,fsdp2,hsdp")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="measured steps a turn")
    parser.add_argument("--images", type=int, default=4, help="per rank")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    ways = options.ways.split(",")
    found: dict[str, list[float]] = {way: [] for way in ways}
    held: dict[str, int] = {}
    with machines(options.rate, 2) as hosts:
        for turn in range(options.turns):
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                line = [sys.executable, "-m", "tests.benchmarks.hybrid_rank", way]
                line += ["--steps", str(options.steps), "--images", str(options.images)]
                result = told(by_horovodrun(line, 4, hosts, {}, 300))
                found[way].append(statistics.median(result["seconds"]))
                held[way] = result["held_bytes"]
                print(f"turn {turn + 1}: {way} {found[way][-1] * 1e3:.0f} ms", file=sys.stderr, flush=True)
    rows = []
    for way in ways:
        ratio = statistics.median(other / own for own, other in zip(found[way], found[ways[0]], strict=True))
        spread = f"{min(found[way]) * 1e3:.0f}-{max(found[way]) * 1e3:.0f}"
        median = statistics.median(found[way]) * 1e3
        rows.append([way, f"{median:.1f}", spread, f"{1 / ratio:.2f}", f"{held[way] / 2**20:.1f}"])
    where = f"2 hosts x 2 ranks, joined at {options.rate}" if options.rate else "4 ranks, loopback"
    caption = f"{where}; {options.turns} turns of {options.steps} steps"
    columns = ["way", "ms", "turns, ms", f"of {ways[0]}", "parameters and state, MiB"]
    publish(options.json, [Table(columns, rows, caption)])


if __name__ == "__main__":
    main()
