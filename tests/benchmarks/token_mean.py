"""How far a gradient is from that of the mean over all tokens: hvdtrain's, plain Horovod's and that of other trainers.

    python -m tests.benchmarks.token_mean

One step on 61 sequences of 1 to 12 tokens, on two ranks, in micro-batches of 8, in float64. The others do what their
first examples do: the mean over the tokens of each micro-batch, averaged over micro-batches and ranks; the Trainer of
transformers counts the tokens of all ranks (`average_tokens_across_devices`), and takes some examples twice to fill
the last micro-batch. What is printed is |gradient - exact| / |exact|, where the exact one is that of a plain loop over
the whole batch. What is not installed is left out: `pip install accelerate lightning transformers`, in an environment
of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.ranks import score_recipes
from tests.ranks.harness import BIN, ROOT

MODULE = "tests.benchmarks.token_mean"
RANKS, MICRO_BATCH = 2, 8
PYTHONPATH = {**os.environ, "PYTHONPATH": str(ROOT)}  # trainers write into the current folder
HOROVODRUN = [str(BIN / "horovodrun"), "--gloo", "-np", str(RANKS)]


def main() -> None:
    """Run each way, and print its error."""
    recipe = score_recipes.Tokens()
    model = recipe.model()
    before = [p.detach().clone() for p in model.parameters()]
    nll, count = sum_losses(model, range(61))
    (nll / count).backward()
    exact = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    ways = {"hvdtrain": train_by_hvdtrain, "plain Horovod": train_by_horovod}
    for name in ("accelerate", "lightning", "transformers"):
        if importlib.util.find_spec(name):
            ways[name] = partial(train_by_torchrun, name)
    with tempfile.TemporaryDirectory() as folder:
        for name, train in ways.items():
            after = train(Path(folder))
            found = torch.cat([(a - b).reshape(-1) for a, b in zip(before, after, strict=True)])
            print(f"{name:14} {float((found - exact).norm() / exact.norm()):.3g}", flush=True)


def sum_losses(model: nn.Module, ids: range) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of some examples' tokens, and the number of these tokens."""
    recipe = score_recipes.Tokens()
    data = recipe.dataset("train")
    losses, _, weights = score_recipes.token_scores(model, *recipe.collate([data[i] for i in ids]))
    return losses.sum(), weights.sum()


def train_by_hvdtrain(folder: Path) -> list[Tensor]:
    """Train one step at a learning rate of 1, and return the parameters."""
    options = ["--lr", "1", "--batch-size", "61", "--micro-batch", str(MICRO_BATCH), "--steps", "1", "--quiet"]
    recipe = f"{score_recipes.__file__}:Tokens"
    command = [str(BIN / "hvdtrain"), "train", recipe, "--run-dir", str(folder / "run"), *options]
    subprocess.run([*HOROVODRUN, *command], check=True, capture_output=True)
    state = torch.load(folder / "run" / "checkpoints" / "step-1" / "state", weights_only=True)["model"]
    return list(state.values())


def train_by_horovod(folder: Path) -> list[Tensor]:
    """The same with Horovod's own optimizer."""
    file = str(folder / "horovod.pt")
    subprocess.run([*HOROVODRUN, sys.executable, "-m", MODULE, "horovod", file], check=True, capture_output=True)
    loaded: list[Tensor] = torch.load(file, weights_only=True)
    return loaded


def train_by_torchrun(way: str, folder: Path) -> list[Tensor]:
    """The same with another trainer, on torch.distributed."""
    file = str(folder / f"{way}.pt")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    subprocess.run([*run, "-m", MODULE, way, file], check=True, capture_output=True, cwd=folder, env=PYTHONPATH)
    loaded: list[Tensor] = torch.load(file, weights_only=True)
    return loaded


def own_micro_batches(rank: int) -> Iterator[range]:
    """Yield the ids of a rank's micro-batches, of a half of the examples each."""
    first, end = 61 * rank // RANKS, 61 * (rank + 1) // RANKS
    for start in range(first, end, MICRO_BATCH):
        yield range(start, min(start + MICRO_BATCH, end))


def run_horovod_rank(file: str) -> None:
    """Make a step of the mean of means with plain Horovod."""
    import horovod.torch as hvd

    hvd.init()
    model = score_recipes.Tokens().model()
    batches = list(own_micro_batches(hvd.rank()))
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), backward_passes_per_step=len(batches))
    for ids in batches:
        nll, count = sum_losses(model, ids)
        (nll / count / len(batches)).backward()
    optimizer.step()
    if hvd.rank() == 0:
        torch.save([p.detach() for p in model.parameters()], file)


def run_accelerate_rank(file: str) -> None:
    """Make a step as Accelerate's guide on gradient accumulation begins."""
    accelerate = importlib.import_module("accelerate")  # it need not be installed

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = score_recipes.Tokens().model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for ids in own_micro_batches(accelerator.process_index):
        with accelerator.accumulate(model):
            nll, count = sum_losses(model, ids)
            accelerator.backward(nll / count)
            optimizer.step()
            optimizer.zero_grad()
    if accelerator.is_main_process:
        torch.save([p.detach() for p in accelerator.unwrap_model(model).parameters()], file)


def run_lightning_rank(file: str) -> None:
    """Make a step with Lightning's Trainer, whose `training_step` returns the mean over a micro-batch."""
    lightning = importlib.import_module("lightning")
    model = score_recipes.Tokens().model()

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, ids: Any) -> Tensor:
            nll, count = sum_losses(self.model, ids)
            return nll / count

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    batches = list(own_micro_batches(int(os.environ["RANK"])))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    own = {"use_distributed_sampler": False, "accumulate_grad_batches": len(batches), "max_epochs": 1}
    trainer = lightning.Trainer(accelerator="cpu", devices=RANKS, strategy="ddp", **own, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        torch.save([p.detach() for p in model.parameters()], file)


def run_transformers_rank(file: str) -> None:
    """Make a step with the Trainer of transformers, and a model that divides by the tokens it counts."""
    transformers = importlib.import_module("transformers")
    recipe = score_recipes.Tokens()

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = recipe.model()

        def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor, **counts: Any) -> dict[str, Tensor]:
            losses, _, weights = score_recipes.token_scores(self.model, tokens, lengths)
            return {"loss": losses.sum() / counts.get("num_items_in_batch", weights.sum())}

    def collate(examples: list[Any]) -> dict[str, Tensor]:
        tokens, lengths = recipe.collate(examples)
        places = torch.arange(tokens.shape[1])
        labels = tokens.masked_fill((places == 0) | (places >= lengths[:, None]), -100)
        return {"tokens": tokens, "lengths": lengths, "labels": labels}

    wrapped = WithLoss()
    arguments = transformers.TrainingArguments(
        **{"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1},
        **{"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": 4, "max_grad_norm": 0},
        **{"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "remove_unused_columns": False},
    )
    trainer = transformers.Trainer(wrapped, arguments, collate, recipe.dataset("train"))
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save([p.detach() for p in wrapped.model.parameters()], file)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ways = {"horovod": run_horovod_rank, "accelerate": run_accelerate_rank}
        ways |= {"lightning": run_lightning_rank, "transformers": run_transformers_rank}
        ways[sys.argv[1]](sys.argv[2])
    else:
        main()
