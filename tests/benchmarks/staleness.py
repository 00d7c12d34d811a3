"""A parameter server with one slow worker of three: examples a second, and time to accuracy, by policy.

    python -m tests.benchmarks.staleness [--seeds 0] [--epochs 20] [--json FILE]

1 server and 3 workers, whose pace sleeping holds: one takes four times as long for an example as the others, so that
even two cores are fast enough. Accuracy is evaluated once an epoch, on the server, in which time workers wait; it
counts. The aims: backup:1 handles 1.4x as many examples a second as sync, bounded:3 2.5x.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.tables import Table, publish

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "benchmarks" / "staleness_recipe.py"
WAYS = {  # stale gradients act as momentum, and an item is a third of the batch: they have less of both
    "sync": [],
    "backup:1": [],
    "bounded:1": ["--momentum", "0.7", "--lr", "0.05"],
    "bounded:3": ["--momentum", "0.7", "--lr", "0.05"],
    "async": ["--momentum", "0.7", "--lr", "0.05"],
    "async+dc": ["--momentum", "0.7", "--lr", "0.05"],
}
TARGET = 0.97


@dataclass(frozen=True)
class Measured:
    """What a run has come to."""

    rate: float  # examples a second, without the evaluations
    seconds: float  # of all epochs
    to_target: float | None  # seconds to the first evaluation of at least TARGET; None: never
    accuracy: float
    staleness: float  # mean
    late: int  # items


def measure(way: str, seed: int, epochs: int) -> Measured:
    """Train once."""
    mpirun = [
        str(Path(sys.executable).with_name("mpirun")),
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [*mpirun, "-np", "4", sys.executable, "-m", "hvdtrain", "train", str(RECIPE), "--run-dir", str(run)]
        command += ["--server", "1", "--staleness", way, "--seed", str(seed), "--epochs", str(epochs), *WAYS[way]]
        command += ["--log-every", "1", "--threads", "1", "--quiet"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
        rows = [json.loads(line) for line in (run / "times.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    began = rows[0][0]
    before = [0, *(samples for _, samples, _, _ in rows)]
    training = sum((samples - earlier) / rate for (_, samples, rate, _), earlier in zip(rows, before, strict=False))
    reached = [when - began for when, *_, accuracy in rows if accuracy is not None and accuracy >= TARGET]
    return Measured(
        rate=rows[-1][1] / training,
        seconds=rows[-1][0] - began,
        to_target=reached[0] if reached else None,
        accuracy=summary["eval"]["accuracy"],
        staleness=summary["service"]["staleness_mean"],
        late=summary["service"]["items_late"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {way: [measure(way, seed, options.epochs) for seed in options.seeds] for way in WAYS}
    base = statistics.median(one.rate for one in found["sync"])
    rows = []
    for way, runs in found.items():
        rate = statistics.median(run.rate for run in runs)
        to_target = [run.to_target for run in runs if run.to_target is not None]
        rows.append(
            [
                " ".join([way, *WAYS[way]]),
                f"{rate:.0f}",
                f"{rate / base:.2f}",
                f"{statistics.median(run.seconds for run in runs):.1f}",
                f"{statistics.median(to_target):.1f}" if len(to_target) == len(runs) else "not by all",
                " ".join(f"{run.accuracy:.4f}" for run in runs),
                f"{statistics.mean(run.staleness for run in runs):.2f}",
                f"{statistics.mean(run.late for run in runs):.0f}",
            ]
        )
    columns = ["--staleness", "examples/s", "x sync", "s in all", f"s to {TARGET:.0%}", "accuracy", "mean age", "late"]
    publish(options.json, [Table(columns, rows, f"{options.epochs} epochs, 3 workers, one at a quarter of the speed")])


if __name__ == "__main__":
    main()
