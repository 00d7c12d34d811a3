"""What each method sends per rank and step for ResNet-18's gradients, by the number of ranks: a Markdown table.

    python -m tests.benchmarks.wire_table [--ranks 2,4,8] [--specs none,fp16,...] [--model resnet18]

It is the mean of steps of a real exchange on this host, over Gloo; a rank receives as much as it sends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.start import by_horovodrun, told
from tests.benchmarks.tables import Table, publish

SPECS = "none,fp16,bf16,int8,onebit,qsgd:4bit,randomk:0.25,powersgd:4,topk:0.01"
STEPS = 2  # powersgd sends one of two sides in turns
LIMIT = 600.0  # seconds for one number of ranks


def megabytes(model: str, specs: Sequence[str], ranks: int) -> dict[str, float]:
    """MB that a rank sends in a step, by method."""
    line = [sys.executable, "-m", "tests.ranks.wire_rank", model, *specs, "--steps", str(STEPS)]
    text = by_horovodrun(line, ranks, [], {}, LIMIT)
    seen = told(text, "WIRE")
    return {spec: seen[0][spec]["counted"] / STEPS / 1e6 for spec in specs}


def table(measured: Mapping[int, Mapping[str, float]]) -> Table:
    """A row for each method; the last column is by how much the most ranks exceed the fewest."""
    counts = sorted(measured)
    fewest, most = counts[0], counts[-1]
    rows = []
    for spec in measured[fewest]:
        cells = [f"{measured[ranks][spec]:.3f}" for ranks in counts]
        rows.append([f"`{spec}`", *cells, f"{measured[most][spec] / measured[fewest][spec]:.2f}"])
    columns = ["method", *(f"{ranks} ranks, MB" for ranks in counts), f"{most} / {fewest}"]
    return Table(columns, rows, "What a rank sends per step:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8", help="numbers of ranks, separated by commas")
    parser.add_argument("--specs", default=SPECS, help="methods, separated by commas")
    parser.add_argument("--model", default="resnet18", choices=["small", "resnet18"])
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    specs = options.specs.split(",")
    measured = {int(ranks): megabytes(options.model, specs, int(ranks)) for ranks in options.ranks.split(",")}
    publish(options.json, [table(measured)])


if __name__ == "__main__":
    main()
