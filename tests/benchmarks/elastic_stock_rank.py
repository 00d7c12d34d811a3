"""One worker of digits by Horovod's own elastic mode, as its documentation tells users to write it.

    horovodrun --gloo ... python -m tests.benchmarks.elastic_stock_rank FOLDER --batch 32 --pause 0.05

It commits every step. Rank 0 appends each step to FOLDER/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from hvdtrain.recipe.registry import load_recipe
from tests.benchmarks.elastic_log import StepLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, required=True, help="of each worker")
    parser.add_argument("--pause", type=float, required=True, help="seconds that each step takes longer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hvd.init()
    recipe = load_recipe("digits")()
    model, data = recipe.model(), recipe.dataset("train")
    optimizer = hvd.DistributedOptimizer(recipe.optimizer(model.parameters()), model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(data)
    loader = torch.utils.data.DataLoader(data, batch_size=options.batch, sampler=sampler)

    @hvd.elastic.run
    def train(state: Any) -> None:
        log = StepLog(options.folder, hvd.rank(), hvd.size())
        while True:
            for state.batch, batch in enumerate(loader):
                time.sleep(options.pause)
                optimizer.zero_grad()
                recipe.score(model, batch)["loss"].mean().backward()
                optimizer.step()
                sampler.record_batch(state.batch, options.batch)
                state.step += 1
                log.step(state.step)
                state.commit()
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            state.batch = 0

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, batch=0, step=0))


if __name__ == "__main__":
    main()
