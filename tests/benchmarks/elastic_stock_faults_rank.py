"""One worker of digits by Horovod's own elastic mode, which ends after some epochs and can fail on purpose.

    horovodrun --gloo ... python -m tests.benchmarks.elastic_stock_faults_rank FOLDER

As Horovod's documentation has it: TorchState, ElasticSampler, a commit every step. Which ids a step consumed is written
down between the two things that `commit` does, so that it stands exactly where the state is saved.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from hvdtrain.recipe.registry import load_recipe
from tests.benchmarks.elastic_log import append

EXAMPLES, BATCH, EPOCHS, PAUSE = 240, 10, 8, 0.3  # the batch is a worker's; seconds that each step takes longer


class Numbered(torch.utils.data.Dataset[Any]):
    """The first digits, each with its id."""

    def __init__(self, digits: Any) -> None:
        self.digits = digits

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.digits[i]


def main() -> None:
    folder = Path(sys.argv[1])
    fault = folder / "fault"

    def said(what: str) -> bool:
        return fault.exists() and fault.read_text() == what

    if said("init-crash"):
        os._exit(9)
    if said("init-hang"):
        time.sleep(3600)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hvd.init()
    recipe = load_recipe("digits")()
    data = Numbered(recipe.dataset("train"))
    model = recipe.model()
    optimizer = hvd.DistributedOptimizer(recipe.optimizer(model.parameters()), model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(data)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, sampler=sampler)

    @hvd.elastic.run
    def train(state: Any) -> None:
        append(folder / "ranks.jsonl", {"rank": hvd.rank(), "size": hvd.size(), "pid": os.getpid()})
        while state.epoch < EPOCHS:
            for state.batch, (ids, batch) in enumerate(loader):
                time.sleep(PAUSE)
                if said("score-always"):
                    raise ValueError("a fault on purpose, always")
                optimizer.zero_grad()
                recipe.score(model, batch)["loss"].mean().backward()
                optimizer.step()
                sampler.record_batch(state.batch, BATCH)
                state.save()
                row = {"epoch": state.epoch, "rank": hvd.rank(), "size": hvd.size(), "ids": ids.tolist()}
                append(folder / f"ids-{os.getpid()}.jsonl", row)
                state.check_host_updates()
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            state.batch = 0
            if hvd.rank() == 0 and (folder / "disk").exists():
                torch.save(model.state_dict(), folder / "disk" / f"epoch-{state.epoch}")
            state.commit()
        if hvd.rank() == 0:
            (folder / "finished").touch()

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, batch=0))


if __name__ == "__main__":
    main()
