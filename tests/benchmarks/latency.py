"""How long ranks wait for a small all-reduce: begun when the last rank has it, or in Horovod's own cycle.

    python -m tests.benchmarks.latency [--rounds 3] [--rate 1gbit]

Two ranks multiply matrices for a while, then add up 1 kB and wait for it: medians of 150 times, in ms, on rank 0, its
waiting for the other rank included. With something to fuse (a threshold of 64 bytes, far below what is sent) Horovod's
background thread is not woken, and asks every 1 to 5 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.start import by_horovodrun, machines, told
from tests.benchmarks.tables import Table, publish

WORK = (0, 1, 10, 60)  # products of 300 x 300 matrices between two all-reduces
TIMES = 150
WAYS = {"woken": "0", "in cycles": "64"}  # HOROVOD_FUSION_THRESHOLD


def on_a_rank() -> None:
    import hvdtrain
    from hvdtrain.comm import collectives

    rank = hvdtrain.init().rank
    torch.set_num_threads(1)
    matrix, values = torch.randn(300, 300), torch.zeros(256)
    waits = []
    for work in WORK:
        seconds = []
        for _ in range(TIMES):
            for _ in range(work):
                matrix @ matrix
            begin = time.perf_counter()
            collectives.wait(collectives.all_reduce_async_(values, "latency"))
            seconds.append(time.perf_counter() - begin)
        waits.append(statistics.median(seconds) * 1e3)
    if rank == 0:
        print("RESULT", json.dumps(waits), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", help="of the links between hosts: 1gbit, ...; default: loopback")
    parser.add_argument("--on-a-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    if options.on_a_rank:
        on_a_rank()
        return
    line = [sys.executable, "-m", "tests.benchmarks.latency", "--on-a-rank"]
    results: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with machines(options.rate, 2) as hosts:
        for _ in range(options.rounds):
            for way, threshold in WAYS.items():
                text = by_horovodrun(line, 2, hosts, {"HOROVOD_FUSION_THRESHOLD": threshold}, 120)
                results[way].append(told(text))
    rows = []
    for way, rounds in results.items():
        rows.append([way, *(f"{statistics.median(column):.2f}" for column in zip(*rounds, strict=True))])
    publish(options.json, [Table(["products before", *map(str, WORK)], rows, "Waits for a small all-reduce, ms:")])


if __name__ == "__main__":
    main()
