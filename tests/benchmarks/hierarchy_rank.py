"""One rank of tests/benchmarks/hierarchy.py.

    python -m tests.benchmarks.hierarchy_rank SPEC ... [--turns 5] [--steps 5]

Rank 0 prints RESULT and, as JSON, {SPEC: [{"seconds": of an exchange, "sent": bytes that its host sent in it}, ...]},
one for each turn; SPEC as of tests/ranks/wire_rank.py.
"""

from __future__ import annotations

import argparse
import json

import torch

import hvdtrain
from tests.ranks.wire_rank import layers, traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    world = hvdtrain.init()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {spec: [] for spec in options.specs}
    for turn in range(options.turns):
        for spec in options.specs[:: 1 if turn % 2 == 0 else -1]:
            one = traffic(layers, spec, options.steps, "eth0")
            found[spec].append({"seconds": one.exchange_seconds / options.steps, "sent": one.sent / options.steps})
    if world.rank == 0:
        print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
