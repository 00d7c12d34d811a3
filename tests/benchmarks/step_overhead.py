"""The loop's own cost: `hvdtrain train` against a bare torch loop, in one run, taking turns.

    python -m tests.benchmarks.step_overhead [--rounds 5] [--steps 12]

Both train cifar10 --net resnet18 --synthetic on one rank, with the same batch and the same loader. The aim is a median
step within 3 % of the bare loop's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.tables import Table, publish

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "cifar10.py"
BATCH = 32


def bare_loop(steps: int) -> list[float]:
    """Seconds of each step of what a person would write by hand."""
    import torch
    from torch.utils.data import DataLoader

    from hvdtrain.recipe.registry import load_recipe

    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = load_recipe(str(RECIPE))(net="resnet18", synthetic=True, batch_size=BATCH)
    model = recipe.model()
    optimizer = recipe.optimizer(model.parameters())
    batches = iter(DataLoader(recipe.dataset("train"), BATCH, shuffle=True))
    seconds = []
    model.train()
    for _ in range(steps):
        begin = time.perf_counter()
        batch = next(batches)
        optimizer.zero_grad()
        loss = recipe.score(model, batch)["loss"].mean()
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise RuntimeError("the loss is not finite")
        seconds.append(time.perf_counter() - begin)
    return seconds


def hvdtrain_loop(steps: int) -> list[float]:
    """Seconds of each step of `hvdtrain train`, from its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = ["--net", "resnet18", "--synthetic", "--batch-size", str(BATCH), "--steps", str(steps)]
        options += ["--log-every", "1", "--threads", "1", "--quiet", "--checkpoint-every", "1000000", "--lr", "0.01"]
        command = [sys.executable, "-m", "hvdtrain", "train", str(RECIPE), "--run-dir", str(run), *options]
        subprocess.run(command, check=True, cwd=ROOT)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [BATCH / row["samples_per_second"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare_loop(options.steps)))
        return
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(options.rounds):
        command = [sys.executable, "-m", "tests.benchmarks.step_overhead", "--bare", "--steps", str(options.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        # The first steps warm up.
        bare += json.loads(done.stdout)[2:]
        ours += hvdtrain_loop(options.steps)[2:]
        print(
            f"bare {statistics.median(bare) * 1e3:7.1f} ms   hvdtrain {statistics.median(ours) * 1e3:7.1f} ms",
            flush=True,
        )
    ratio = statistics.median(ours) / statistics.median(bare)
    medians = [f"{statistics.median(seconds) * 1e3:.1f}" for seconds in (bare, ours)]
    columns = ["bare loop, ms", "hvdtrain, ms", "hvdtrain / bare"]
    publish(options.json, [Table(columns, [[*medians, f"{ratio:.3f}"]], f"Medians of {len(ours)} steps each:")])


if __name__ == "__main__":
    main()
