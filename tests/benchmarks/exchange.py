"""Step time of ways to exchange gradients, side by side in one run: medians and ratios.

    python -m tests.benchmarks.exchange [--rounds 3] [--steps 20] [--ways none,horovod,ddp,bucketed] [--json FILE]
    python -m tests.benchmarks.exchange --rate 1gbit --ways none,ddp,ddp-fp16,bucketed,bucketed:powersgd:4,bucketed:auto

ResNet-18, 16 images of 64x64 per rank (or --images), two ranks (or --ranks) with one thread each: on this host, or with
--rate each on a host of its own, joined by links of that rate (needs root). Ways take turns, and each round begins with
another.

A way is one of none (no exchange), horovod (stock), ddp, ddp-fp16, ddp-hook:SPEC (hvdtrain's hook in DDP), bucketed
(hvdtrain's), bucketed:SPEC with a compression; behind it +channels-last, +malloc (glibc keeps freed memory), +bound or
+unbound (each rank to its share of the host's cores, as hvdtrain does itself, or not) or +NAME=VALUE, an environment
variable.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.start import by_horovodrun, machines, told
from tests.benchmarks.tables import Table, publish
from tests.hosts.cluster import Host

# Keeps memory that is freed: gradients and activations of each step otherwise cost thousands of page faults.
MALLOC = {
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
WARM_UP = 5  # steps that do not count
SLOWEST = 20  # seconds of a step, at most
DEFAULT = "none,horovod,ddp,ddp+channels-last,bucketed,bucketed+channels-last"


def measure(way: str, options: argparse.Namespace, hosts: Sequence[Host]) -> dict[str, Any]:
    """One turn of a way: {"seconds": those of each step that counts, "wire_bytes": of rank 0's last step, or None}."""
    name, *more = way.split("+")
    unmeasured = WARM_UP + (options.settle if name.startswith("bucketed:auto") else 0)
    line = [sys.executable, "-m", "tests.benchmarks.step_rank", name, "--steps", str(unmeasured + options.steps)]
    line += ["--images", str(options.images)]
    env: dict[str, str] = {}
    for modifier in more:
        if modifier == "channels-last":
            line.append("--channels-last")
        elif modifier in ("bound", "unbound"):
            line += ["--cores", "own" if modifier == "bound" else "any"]
        elif modifier == "malloc":
            env |= MALLOC
        else:
            variable, equals, value = modifier.partition("=")
            if not equals:
                raise SystemExit(
                    f"{way}: +{modifier} is none of +channels-last, +malloc, +bound, +unbound, +NAME=VALUE"
                )
            env[variable] = value
    text = by_horovodrun(line, options.ranks, hosts, env, 60 + SLOWEST * (unmeasured + options.steps))
    if options.show:
        print(f"--- {way}\n{text}", flush=True)
    result: dict[str, Any] = told(text)
    result["seconds"] = result["seconds"][unmeasured:]
    return result


def table(caption: str, ways: Sequence[str], against: Sequence[str], results: dict[str, list[dict[str, Any]]]) -> Table:
    """The median over all rounds, its spread over the rounds, bytes, how much faster than others."""
    medians = {way: statistics.median(s for turn in results[way] for s in turn["seconds"]) for way in ways}
    rows = []
    for way in ways:
        rounds = [statistics.median(turn["seconds"]) * 1e3 for turn in results[way]]
        wire = results[way][-1]["wire_bytes"]
        sent = "" if wire is None else f"{wire / 1e3:,.0f}"
        ratios = [f"{medians[other] / medians[way]:.2f}" for other in against]
        rows.append([way, f"{medians[way] * 1e3:.1f}", f"{min(rounds):.0f}-{max(rounds):.0f}", sent, *ratios])
    return Table(["way", "ms", "rounds, ms", "kB sent", *(f"x {other}" for other in against)], rows, caption)


def listed(text: str) -> list[str]:
    """The ways of a list; a comma also stands within a way, before an option of its compression."""
    return re.split(r",(?=(?:none|horovod|ddp|bucketed)(?:[-:+,]|$))", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="measured steps a turn")
    parser.add_argument("--settle", type=int, default=200, help="steps before those, for bucketed:auto to choose in")
    parser.add_argument("--ways", type=listed, default=DEFAULT)
    parser.add_argument("--against", type=listed, help="the ways that ratios are to; default: all")
    parser.add_argument("--rate", help="of the links between hosts: 1gbit, 100mbit, ...; default: loopback")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=16, help="per rank; fewer make the network matter more")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    parser.add_argument("--show", action="store_true", help="show what the ranks print")
    options = parser.parse_args()
    ways, against = options.ways, options.against or options.ways
    if strange := set(against) - set(ways):
        parser.error(f"--against names what is not measured: {', '.join(strange)}")
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with machines(options.rate, options.ranks) as hosts:
        for turn in range(options.rounds):
            first = turn % len(ways)
            for way in ways[first:] + ways[:first]:
                results[way].append(measure(way, options, hosts))
                print(
                    f"round {turn + 1}  {way:32} {statistics.median(results[way][-1]['seconds']) * 1e3:7.1f} ms",
                    file=sys.stderr,
                    flush=True,
                )
    where = f"hosts joined at {options.rate}" if options.rate else "loopback"
    caption = f"{options.ranks} ranks, {where}; {options.rounds} rounds of {options.steps} steps; x: times as fast as"
    publish(options.json, [table(caption, ways, against, results)])


if __name__ == "__main__":
    main()
