"""One rank of a training by torch's DistributedDataParallel, equal to `hvdtrain train RECIPE` in all but the exchange.

    python -m tests.benchmarks.ddp_rank RECIPE.py [--fp16] [--epochs N] [--seed N] [--eval-every STEPS]

The same examples in each step, batch, schedule, initial weights and optimizer; started by horovodrun. Rank 0 prints
RESULT and, as JSON, the seconds of each step and [step, accuracy] of each evaluation, which is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hvdtrain.recipe import order
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.recipe.schedule import parse_schedule
from hvdtrain.torch import Recipe
from hvdtrain.torch.data import BatchDataset, seed_all
from hvdtrain.torch.loader import BatchLoader
from tests.benchmarks.step_rank import in_ddp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--fp16", action="store_true", help="torch's hook that sends gradients in half precision")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(str(options.recipe))()
    train, held_out = recipe.dataset("train"), recipe.dataset("eval")
    seed_all([options.seed])
    model = recipe.model()
    optimizer = recipe.optimizer(model.parameters())
    model = in_ddp(model, options.fp16)
    rank, size = dist.get_rank(), dist.get_world_size()
    epochs = options.epochs or recipe.epochs
    steps_per_epoch = -(-len(train) // recipe.batch_size)
    steps = epochs * steps_per_epoch
    schedule = parse_schedule(recipe.schedule, steps, steps_per_epoch)

    step = 0
    seconds: list[float] = []
    evaluations: list[tuple[int, float]] = []
    for epoch in range(epochs):
        all_ids = list(order.iterate_batches(len(train), recipe.batch_size, options.seed, epoch))
        parts = [ids[slice(*order.part_bounds(len(ids), rank, size))] for ids in all_ids]
        loaded = BatchLoader(BatchDataset(recipe, "train", train), workers=0).load_batches(parts, [options.seed, epoch])
        for ids in all_ids:
            begin = time.perf_counter()
            _, batch = next(loaded)
            model.train()
            optimizer.zero_grad()
            # DDP takes the mean over ranks: this makes it the mean over the examples of all.
            (recipe.score(model, batch)["loss"].sum() * size / len(ids)).backward()
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * schedule.factor(step)
            optimizer.step()
            seconds.append(round(time.perf_counter() - begin, 6))
            step += 1
            if step % options.eval_every == 0 or step == steps:
                evaluations.append((step, accuracy(recipe, model, held_out, rank, size)))
    if rank == 0:
        print("RESULT", json.dumps({"seconds": seconds, "evaluations": evaluations}), flush=True)
    dist.barrier()
    os._exit(0)


@torch.no_grad()
def accuracy(recipe: Recipe, model: torch.nn.Module, held_out: torch.utils.data.Dataset, rank: int, size: int) -> float:
    """The part of the evaluation examples that is recognized, each by one rank; collective."""
    model.eval()
    count = len(held_out)  # type: ignore[arg-type]
    chunks = order.split_micro_batches(np.arange(*order.part_bounds(count, rank, size)), recipe.batch_size)
    # What is called has no hooks: DDP's forward would wait for the other rank.
    loaded = BatchLoader(BatchDataset(recipe, "eval", held_out), workers=0).load_batches(chunks, [0])
    scores = [recipe.score(model.module, batch)["accuracy"].sum() for _, batch in loaded]
    right = torch.stack(scores).sum()
    dist.all_reduce(right)
    return float(right) / count


if __name__ == "__main__":
    main()
