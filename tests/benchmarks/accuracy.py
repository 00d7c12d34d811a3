"""The accuracy that each compression ends with, against none: real trainings by `hvdtrain launch`, over some seeds.

    python -m tests.benchmarks.accuracy --results FILE [--recipes digits cifar_shaped] [--seeds 0 1 2] [--epochs N]
        [--specs none int8 topk:0.01 topk:0.01,feedback=off]

Two ranks (or --ranks) on this host, with one thread each; the recipe's own epochs if none are given. Each finished run
is a line of FILE: started again with the same options, it does what is missing. Prints a Markdown table per recipe.

On two cores a run of digits takes about 10 to 20 seconds, one of cifar_shaped 2 to 4 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.finished import Results
from tests.benchmarks.start import ROOT, by_hvdtrain
from tests.benchmarks.tables import Table, publish

# By default one weight of digits is compressed, 18,432 of its 21,386 values; with min=64 in a specification all three.
RECIPES = {
    "digits": ROOT / "recipes" / "digits.py",
    "cifar_shaped": ROOT / "tests" / "benchmarks" / "cifar_shaped.py",
}
METHODS = ["none", "fp16", "bf16", "int8", "onebit", "qsgd:4bit", "topk:0.01", "randomk:0.25", "powersgd:4"]
WITHOUT_FEEDBACK = [f"{method},feedback=off" for method in ("int8", "onebit", "topk:0.01", "powersgd:4")]
LONGEST = 3600  # seconds of a run
NEVER = "1000000000"  # in steps


def train(recipe: str, spec: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a run ends with; its accuracy, from 0 to 1, is None where the loss grew beyond all bounds."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        line = [str(RECIPES[recipe]), "--compression", spec, "--seed", str(seed)]
        line += ["--run-dir", str(run), "--checkpoint-every", NEVER, "--log-every", NEVER, "--quiet"]
        line += ["--epochs", str(options.epochs)] if options.epochs else []
        try:
            by_hvdtrain(line, options.ranks, [], LONGEST)
        except RuntimeError as error:
            if "the loss is not finite" not in str(error):
                raise
            return {"accuracy": None}
        summary = json.loads((run / "summary.json").read_text())
    kept = ("train_loss", "steps", "step_seconds_median", "wire_bytes_per_step")
    return {"accuracy": summary["eval"]["accuracy"], **{name: summary[name] for name in kept}}


def table(caption: str, specs: Sequence[str], rows: Sequence[dict[str, Any]]) -> Table:
    """A recipe's rows: accuracies in percent, differences in points of it, mean over seeds."""
    dense = {row["seed"]: row["accuracy"] for row in rows if row["spec"] == "none"}
    lines = []
    for spec in specs:
        own = [row for row in rows if row["spec"] == spec]
        if any(row["accuracy"] is None for row in own):
            lines.append([spec, "diverged", "", "", "", ""])
            continue
        values = [row["accuracy"] * 100 for row in own]
        gaps = [(row["accuracy"] - dense[row["seed"]]) * 100 for row in own if dense.get(row["seed"]) is not None]
        each, apart = " ".join(f"{value:.1f}" for value in values), " ".join(f"{gap:+.1f}" for gap in gaps)
        gap = f"{statistics.fmean(gaps):+.2f}" if gaps else ""
        wire = own[0]["wire_bytes_per_step"] / 1e3
        lines.append([spec, f"{statistics.fmean(values):.2f}", each, gap, apart, f"{wire:,.1f}"])
    columns = ["method", "accuracy, %", "of each seed", "against none", "of each seed", "kB per step"]
    return Table(columns, lines, caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="file of finished runs, to go on with")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--specs", nargs="+", default=METHODS + WITHOUT_FEEDBACK)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the recipe's own")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    results = Results(options.results)
    chosen: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in options.recipes}
    for recipe in options.recipes:
        for seed in options.seeds:
            for spec in options.specs:
                about = {"recipe": recipe, "spec": spec, "seed": seed, "epochs": options.epochs, "ranks": options.ranks}
                row = results.find(about)
                if row is None:
                    row = {**about, **train(recipe, spec, seed, options)}
                    results.add(row)
                chosen[recipe].append(row)
                print(f"{recipe:14} seed {seed}  {spec:28} {row['accuracy']}", file=sys.stderr, flush=True)
    about = f"{options.ranks} ranks, seeds {', '.join(map(str, options.seeds))}"
    publish(options.json, [table(f"{recipe}, {about}", options.specs, rows) for recipe, rows in chosen.items()])


if __name__ == "__main__":
    main()
