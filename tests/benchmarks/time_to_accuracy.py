"""How long training takes to an accuracy over a slow network: hvdtrain's compressions against torch DDP.

    python -m tests.benchmarks.time_to_accuracy --results FILE [--plot PNG] [--rate 1gbit] [--target PERCENT]
        [--ways none fp16 powersgd:4 topk:0.01 ddp ddp-fp16] [--seeds 0] [--epochs N] [--eval-every STEPS]

Trains cifar_shaped on two hosts joined by links of that rate (needs root), a rank with one thread on each. A way is a
compression of hvdtrain's, ddp, or ddp-fp16 with torch's hook. The time is that of the steps alone, on both sides. Each
finished run is a line of FILE: started again, it does what is missing. Prints a Markdown table; the plot needs
matplotlib.

On two cores at 1gbit a run takes 3 to 6 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.finished import Results
from tests.benchmarks.start import ROOT, by_horovodrun, by_hvdtrain, machines, told
from tests.benchmarks.tables import Table, publish
from tests.hosts.cluster import Host

RECIPE = ROOT / "tests" / "benchmarks" / "cifar_shaped.py"
WAYS = ["none", "fp16", "powersgd:4", "topk:0.01", "ddp", "ddp-fp16"]
LONGEST = 3600  # seconds of a run
Curve = list[tuple[float, float]]  # seconds of training so far, accuracy from 0 to 1


def by_ddp(way: str, seed: int, options: argparse.Namespace, hosts: Sequence[Host]) -> dict[str, Any]:
    """Train with torch DDP: {"curve": ..., "step_seconds": the median}."""
    line = [sys.executable, "-m", "tests.benchmarks.ddp_rank", str(RECIPE), "--seed", str(seed)]
    line += ["--eval-every", str(options.eval_every)] + (["--fp16"] if way == "ddp-fp16" else [])
    line += ["--epochs", str(options.epochs)] if options.epochs else []
    text = by_horovodrun(line, 2, hosts, {}, LONGEST)
    result = told(text)
    seconds = result["seconds"]
    curve = [(sum(seconds[:step]), accuracy) for step, accuracy in result["evaluations"]]
    return {"curve": curve, "step_seconds": statistics.median(seconds)}


def by_ours(spec: str, seed: int, options: argparse.Namespace, hosts: Sequence[Host]) -> dict[str, Any]:
    """Train with `hvdtrain launch`; the same."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        line = [str(RECIPE), "--compression", spec, "--seed", str(seed), "--eval-every", str(options.eval_every)]
        line += ["--run-dir", str(run), "--checkpoint-every", "1000000000", "--quiet"]
        line += ["--epochs", str(options.epochs)] if options.epochs else []
        by_hvdtrain(line, 2, hosts, LONGEST)
        summary = json.loads((run / "summary.json").read_text())
        rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    curve: Curve = []
    seconds = samples = 0.0
    for row in rows:
        # A row's rate is that of the steps since the row before.
        seconds += (row["samples"] - samples) / row["samples_per_second"]
        samples = row["samples"]
        if "eval_accuracy" in row:
            curve.append((seconds, row["eval_accuracy"]))
    return {"curve": curve, "step_seconds": summary["step_seconds_median"]}


def seconds_to(target: float, curve: Curve) -> float:
    """When the accuracy was first reached; infinite if it was not."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), math.inf)


def table(caption: str, target: float, runs: dict[str, list[dict[str, Any]]]) -> Table:
    """By way: medians over the seeds."""
    reached = {way: statistics.median(seconds_to(target, run["curve"]) for run in own) for way, own in runs.items()}
    against = [way for way in ("ddp", "ddp-fp16") if way in runs]
    rows = []
    for way, own in runs.items():
        final = statistics.median(run["curve"][-1][1] for run in own) * 100
        step = statistics.median(run["step_seconds"] for run in own) * 1e3
        time = f"{reached[way]:.1f}" if math.isfinite(reached[way]) else "never"
        faster = [f"{reached[other] / reached[way]:.2f}" if math.isfinite(reached[way]) else "" for other in against]
        name = way if way.startswith("ddp") else f"hvdtrain {way}"
        rows.append([name, time, *faster, f"{final:.1f}", f"{step:.0f}"])
    columns = ["way", f"s to {target:.0%}", *(f"x {way}" for way in against), "final accuracy, %", "step, ms"]
    return Table(columns, rows, caption)


def plot(path: Path, title: str, target: float, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw accuracy against seconds, a colour for each way and a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (way, own) in enumerate(runs.items()):
        for run in own:
            seconds, accuracies = zip(*run["curve"], strict=True)
            axes.plot(
                seconds,
                [value * 100 for value in accuracies],
                color=f"C{number}",
                linestyle="--" if way.startswith("ddp") else "-",
                label=(way if way.startswith("ddp") else f"hvdtrain {way}") if run is own[0] else None,
            )
    axes.axhline(target * 100, color="grey", linewidth=0.5)
    axes.set(title=title, xlabel="seconds of training", ylabel="evaluation accuracy, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="file of finished runs, to go on with")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--target", type=float, help="accuracy in percent; default: the highest that all runs reach")
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="default: the recipe's own")
    parser.add_argument("--eval-every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    results = Results(options.results)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    same = {name: getattr(options, name) for name in ("rate", "epochs", "eval_every")}
    with machines(options.rate, 2) as hosts:
        for seed in options.seeds:
            for way in options.ways:
                about = {"way": way, "seed": seed, **same}
                row = results.find(about)
                if row is None:
                    train = by_ddp if way.startswith("ddp") else by_ours
                    row = {**about, **train(way, seed, options, hosts)}
                    results.add(row)
                runs[way].append(row)
                seconds, accuracy = row["curve"][-1]
                print(f"seed {seed}  {way:16} {accuracy:.1%} after {seconds:.1f} s", file=sys.stderr, flush=True)
    if options.target:
        target = options.target / 100
    else:
        # In steps of 5 %: the best that a run reaches, it reaches late and by luck.
        worst = min(max(accuracy for _, accuracy in run["curve"]) for own in runs.values() for run in own)
        target = math.floor(worst * 20) / 20
    title = f"ResNet-18, cifar_shaped, two hosts joined at {options.rate}"
    caption = f"{title}; seeds {', '.join(map(str, options.seeds))}; x: times as fast as"
    publish(options.json, [table(caption, target, runs)])
    if options.plot:
        plot(options.plot, title, target, runs)


if __name__ == "__main__":
    main()
