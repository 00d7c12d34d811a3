"""One worker of digits in torch's DistributedDataParallel with a checkpoint every step, for torchrun.

    torchrun --nproc-per-node 4 --max-restarts 100 -m tests.benchmarks.elastic_torchrun_rank FOLDER --pause 0.05

It goes on from FOLDER/checkpoint.pt. Rank 0 appends each step to FOLDER/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hvdtrain.recipe import order
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch.data import BatchDataset
from hvdtrain.torch.loader import BatchLoader
from tests.benchmarks.elastic_log import StepLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause", type=float, required=True, help="seconds that each step takes longer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    recipe = load_recipe("digits")()
    model, data = recipe.model(), recipe.dataset("train")
    optimizer = recipe.optimizer(model.parameters())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    path, step, first = options.folder / "checkpoint.pt", 0, 0
    per_epoch = -(-len(data) // recipe.batch_size)
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        first = step % per_epoch
    log = StepLog(options.folder, rank, size)
    for epoch in itertools.count(step // per_epoch):
        all_ids = list(order.iterate_batches(len(data), recipe.batch_size, 0, epoch))[first:]
        parts = [ids[slice(*order.part_bounds(len(ids), rank, size))] for ids in all_ids]
        loaded = BatchLoader(BatchDataset(recipe, "train", data), workers=0).load_batches(parts, [0, epoch])
        first = 0
        for ids in all_ids:
            _, batch = next(loaded)
            time.sleep(options.pause)
            optimizer.zero_grad()
            (recipe.score(parallel, batch)["loss"].sum() * size / len(ids)).backward()
            optimizer.step()
            step += 1
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
            log.step(step)


if __name__ == "__main__":
    main()
