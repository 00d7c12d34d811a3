"""How long the ranks of a pipeline wait for each other: stages that sleep, against theory and torch's own schedules.

    python -m tests.benchmarks.bubble --stages 2 --micro-batches 8 --seconds 0.02

A stage sleeps `seconds` forward and twice that backward, divided among the stages that a rank has. In theory a step
takes (M + (N - 1) / v) times what a micro-batch takes on a rank: M micro-batches, N ranks, v stages a rank. Steps of
torch's schedule, of the same stages with nothing of hvdtrain, are taken in turns with hvdtrain's.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.utils._pytree import tree_flatten

from hvdtrain.exchange.pipeline_options import STAGES_PER_RANK
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch.division import Tried, plan_stages
from hvdtrain.torch.model_chain import Passed, find_chain
from hvdtrain.torch.pipeline import SEVERAL, SINGLE, MicroBatch, Pipeline
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.stage_cut import StageCut
from hvdtrain.torch.stages import keep_modules
from hvdtrain.torch.stand_in import StandIn
from hvdtrain.training.options import make_run_options

WIDTH = 16


class Sleep(torch.autograd.Function):
    """Sleeps forward, and twice as long backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradients[0].clone(), None


class Layer(nn.Module):
    """A stage."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(WIDTH, WIDTH), seconds

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = Sleep.apply(self.linear(x), self.seconds)  # type: ignore[no-untyped-call]
        return output


def make_torch_step(kind: str, rank: int, options: argparse.Namespace) -> Callable[[], None]:
    """Return a step of torch's schedule, as a script would take it."""
    ranks, per_rank = options.stages, STAGES_PER_RANK[kind]
    batch = torch.randn(2 * options.micro_batches, WIDTH)
    stages = [
        PipelineStage(
            Layer(options.seconds / per_rank),
            number,
            ranks * per_rank,
            torch.device("cpu"),
            input_args=(torch.randn(2, WIDTH, requires_grad=number > 0),),
            output_args=(torch.randn(2, WIDTH, requires_grad=True),),
        )
        for number in range(rank, ranks * per_rank, ranks)
    ]

    def compute_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum()

    schedule: Any = (SINGLE | SEVERAL)[kind](  # type: ignore[operator]
        stages[0] if kind in SINGLE else stages, options.micro_batches, compute_loss, scale_grads=False
    )
    args = [batch] if rank == 0 else []
    kwargs = {"target": batch} if rank == ranks - 1 else {}
    return lambda: schedule.step(*args, **kwargs)


def run_rank(rank: int, store: str, options: argparse.Namespace) -> None:
    """Time each schedule as one rank; the first one prints."""
    torch.set_num_threads(1)
    ranks, count = options.stages, options.micro_batches
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    recipe = load_recipe("digits")()
    for kind, per_rank in STAGES_PER_RANK.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(Layer(options.seconds / per_rank) for _ in range(ranks * per_rank)))
        scorer = Scorer(recipe, torch.device("cpu"), make_run_options({}))
        examples = torch.randn(2, WIDTH)
        chain = find_chain(model, lambda model=model, examples=examples: model(examples), "the model")
        leaves, structure = tree_flatten((examples,))
        tried = Tried(chain, Passed(structure, tuple(leaves)), 2)
        cut = StageCut(tuple(range(1, len(chain) + 1)))
        division = plan_stages(recipe, model, tried, cut, 2)
        own = division.list_own(rank, ranks)
        keep_modules(model, [link.name for stage in own for link in stage.links])
        pipeline = Pipeline(kind, own, division.stages[-1].returned, scorer, count)
        recipe.score = lambda model, batch: {"loss": model(batch).square().sum(1)}

        def compute_loss(one: MicroBatch, model: StandIn, recipe: Any = recipe) -> Tensor:
            loss: Tensor = recipe.score(model, one.batch)["loss"].sum()
            return loss

        batches = [MicroBatch(torch.randn(2, WIDTH), 2, (0, number)) for number in range(count)]
        ways: list[Callable[[], None]] = [
            functools.partial(pipeline.train, model, batches, compute_loss),
            make_torch_step(kind, rank, options),
        ]
        seconds: list[list[float]] = [[], []]
        for _ in range(options.steps + 1):
            for way, times in zip(ways, seconds, strict=True):
                dist.barrier()
                begin = time.perf_counter()
                way()
                dist.barrier()
                times.append(time.perf_counter() - begin)
        theory = 3 * options.seconds * (count + (ranks - 1) / per_rank)
        found, bare = (statistics.median(times[1:]) for times in seconds)
        if rank == 0:
            print(
                f"{kind:12} {found * 1e3:7.1f} ms, theory {theory * 1e3:7.1f} ms, {found / theory:.3f} of it; "
                f"idle {1 - 3 * options.seconds * count / found:.1%}; torch's schedule {bare * 1e3:7.1f} ms",
                flush=True,
            )


def main() -> None:
    """Run ranks as processes of this host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(options.stages):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run_rank(rank, str(Path(folder) / "store"), options)
                    code = 0
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
