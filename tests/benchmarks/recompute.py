"""What --recompute saves and costs: bytes kept for the backward pass, and the time of a step.

    python -m tests.benchmarks.recompute [--width 128 --depth 6 ...]        options of the recipe charlm

In turns, so that a change of the machine's load meets all ways alike; medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import hvdtrain
from hvdtrain.bench.activations import KeptActivations
from hvdtrain.cli.train import load_arguments
from hvdtrain.torch.recompute import recompute_blocks
from hvdtrain.training.options import make_run_options, split_options

SPECS = (None, "every:2", "all")
TURNS = 7


def run_step(recipe: Any, model: nn.Module, batch: Tensor, spec: str | None) -> tuple[int, float]:
    """Return the bytes that the forward pass keeps, parameters left out, and the seconds of both passes."""
    kept = KeptActivations(model)
    with recompute_blocks(recipe, model, make_run_options({"recompute": spec})):
        torch.manual_seed(1)
        with kept.record_forward():
            loss = recipe.score(model, batch)["loss"][0].sum()
        del loss
        model.zero_grad()
        torch.manual_seed(1)
        begin = time.perf_counter()
        recipe.score(model, batch)["loss"][0].sum().backward()
        return kept.total_bytes, time.perf_counter() - begin


def main() -> None:
    hvdtrain.init()
    torch.set_num_threads(1)
    arguments = load_arguments(["charlm", *sys.argv[1:]])
    recipe, _ = split_options(arguments.recipe_class, arguments.given_options)
    model, dataset = recipe.model(), recipe.dataset("train")
    batch = torch.stack([dataset[i] for i in range(recipe.batch_size)])
    kept: dict[str | None, int] = {}
    seconds: dict[str | None, list[float]] = {spec: [] for spec in SPECS}
    gradients: dict[str | None, Tensor] = {}
    for _ in range(TURNS):
        for spec in SPECS:
            kept[spec], taken = run_step(recipe, model, batch, spec)
            seconds[spec].append(taken)
            gradients[spec] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for spec in SPECS:
        same = "the same bits" if torch.equal(gradients[spec], gradients[None]) else "OTHER BITS"
        median = statistics.median(seconds[spec])
        print(f"{spec or 'off':8}  {kept[spec] / 2**20:8.1f} MiB kept  {median * 1e3:8.1f} ms  gradients: {same}")


if __name__ == "__main__":
    main()
