"""One worker of digits by Horovod's own elastic mode, which ends after some epochs and can fail on purpose.

    horovodrun --gloo ... python -m tests.benchmarks.elastic_stock_faults_rank FOLDER

As Horovod's documentation has it: TorchState, ElasticSampler, a commit every step. Which ids a step consumes is written
down before its gradients are sent, with the number of the step, which is part of the state, and the world in which it
is tried: what the weights have consumed is what the last try of each step did.
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

    def fail(moment: str) -> None:
        if said(f"{moment}-crash"):
            os._exit(9)
        if said(f"{moment}-hang"):
            time.sleep(3600)

    fail("init")
    torch.set_num_threads(1)
    hvd.init()
    fail("late")
    recipe = load_recipe("digits")()
    data = Numbered(recipe.dataset("train"))
    model = recipe.model()
    optimizer = hvd.DistributedOptimizer(recipe.optimizer(model.parameters()), model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(data)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, sampler=sampler)

    @hvd.elastic.run
    def train(state: Any) -> None:
        world = hvd.broadcast_object(time.time(), name="world")
        append(folder / "ranks.jsonl", {"rank": hvd.rank(), "size": hvd.size(), "pid": os.getpid()})
        while state.epoch < EPOCHS:
            for state.batch, (ids, batch) in enumerate(loader):
                time.sleep(PAUSE * (10 if said("slow") else 1))
                if said("score-always"):
                    raise ValueError("a fault on purpose, always")
                row = {"step": state.step, "world": world, "at": time.time(), "epoch": state.epoch}
                row |= {"rank": hvd.rank(), "size": hvd.size(), "ids": ids.tolist()}
                append(folder / f"ids-{os.getpid()}.jsonl", row)
                optimizer.zero_grad()
                recipe.score(model, batch)["loss"].mean().backward()
                optimizer.step()
                sampler.record_batch(state.batch, BATCH)
                state.step += 1
                state.commit()
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            state.batch = 0
            if hvd.rank() == 0 and (folder / "disk").exists():
                torch.save(model.state_dict(), folder / "disk" / f"epoch-{state.epoch}")
            state.commit()
        values = torch.cat([value.detach().double().reshape(-1) for value in model.state_dict().values()])
        append(folder / "weights.jsonl", {"rank": hvd.rank(), "sum": values.sum().item()})
        if hvd.rank() == 0:
            (folder / "finished").touch()

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, batch=0, step=0))


if __name__ == "__main__":
    main()
