"""The order of examples: time and memory to the first step, and per id, against numpy's permutation.

    python -m tests.benchmarks.order

One process, one thread. `--accuracy SEEDS` also trains digits in the order of either, and compares the accuracies.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np

from hvdtrain.recipe import order
from tests.benchmarks.tables import Table, publish

BATCH = 128


def first_step(examples: int) -> tuple[float, float]:
    """Seconds and MiB until the ids of the first step are there."""
    begin = time.perf_counter()
    next(order.iterate_batches(examples, BATCH, 0, 0))
    seconds = time.perf_counter() - begin
    tracemalloc.start()
    next(order.iterate_batches(examples, BATCH, 0, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 2**20


def nanoseconds_per_id(examples: int, steps: int) -> float:
    """Of the steps of an epoch, one after the other."""
    batches = order.iterate_batches(examples, BATCH, 0, 0)
    begin = time.perf_counter()
    count = sum(len(next(batches)) for _ in range(steps))
    return (time.perf_counter() - begin) / count * 1e9


def numpy_per_id(examples: int) -> float:
    generator = np.random.default_rng(0)
    begin = time.perf_counter()
    generator.permutation(examples)
    return (time.perf_counter() - begin) / examples * 1e9


def digits_accuracies(seeds: int) -> tuple[list[float], list[float]]:
    """Final accuracies of digits, trained in this order and in numpy's shuffle."""
    import tempfile

    import hvdtrain
    from hvdtrain.recipe.registry import load_recipe

    class Shuffled(order.SampleOrder):
        def __init__(self, examples: int, seed: int, epoch: int) -> None:
            super().__init__(examples, seed, epoch)
            self._shuffled = np.random.default_rng([seed, epoch]).permutation(examples)

        def ids(self, begin: int, end: int) -> order.Ids:
            return self._shuffled[begin:end]

    def accuracy(seed: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            summary = hvdtrain.fit(
                load_recipe("digits")(), run_dir=f"{folder}/run", seed=seed, quiet=True, ledger=False
            )
        return float(summary["eval"]["accuracy"])

    ours = [accuracy(seed) for seed in range(seeds)]
    with mock.patch.object(order, "Order", Shuffled):
        return ours, [accuracy(seed) for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    rows = []
    for examples in (10**3, 10**6, 10**9, 10**12):
        seconds, mib = first_step(examples)
        each = statistics.median(nanoseconds_per_id(examples, min(2000, examples // BATCH)) for _ in range(5))
        cells = [f"{seconds * 1e3:.2f}", f"{mib:.2f}", f"{each:.0f}", f"{each * BATCH / 1e3:.1f}"]
        rows.append([f"{examples:,}", *cells])
    columns = ["examples", "first step after, ms", "MiB", "ns per id", f"us per step of {BATCH}"]
    tables = [Table(columns, rows)]
    whole = statistics.median(nanoseconds_per_id(10**7, 10**7 // BATCH) for _ in range(3))
    row = [f"{whole:.0f}", f"{numpy_per_id(10**7):.0f}"]
    tables.append(Table(["all of 10^7, ns per id", "numpy's permutation"], [row]))
    if options.accuracy:
        ours, numpys = digits_accuracies(options.accuracy)
        rows = []
        for name, found in (("this order", ours), ("numpy's", numpys)):
            rows.append([name, f"{statistics.mean(found):.4f} +- {statistics.stdev(found):.4f}"])
        tables.append(Table(["order", f"accuracy of digits, {options.accuracy} seeds"], rows))
    publish(options.json, tables)


if __name__ == "__main__":
    main()
