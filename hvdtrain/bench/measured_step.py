"""A step of a recipe on one rank, with the micro-batch that it has among many: the bytes of all that it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from hvdtrain.bench.activations import KeptActivations, count_memory
from hvdtrain.bench.layouts import TrainedParameters, count_bytes
from hvdtrain.bench.stage_memory import StageMemory, measure_stages
from hvdtrain.comm.world import GridShape, World
from hvdtrain.exchange.partition import ShardUnit
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.framework import StepVotes
from hvdtrain.recipe.now import set_now
from hvdtrain.recipe.shares import even_shares
from hvdtrain.system.errors import UserError
from hvdtrain.system.memory import PeakMemory
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recompute import find_blocks
from hvdtrain.torch.setup import make_optimizers
from hvdtrain.torch.shard_trial import find_shard_unit
from hvdtrain.torch.step import TorchStep
from hvdtrain.torch.table_group import Table
from hvdtrain.torch.tables import find_tables, names_tables
from hvdtrain.training.options import RunOptions

MAX_STEPS = 30  # until all optimizers have stepped: a loss may be left out of some, and a loss scale skips some


@dataclass(frozen=True)
class MeasuredStep:
    """A step of one rank, with the micro-batch that it has among many.

    Attributes:
        device: of the rank.
        model_bytes: of parameters and buffers.
        optimizers: what each has after the step.
        kept_bytes: what the forward pass kept for the backward pass.
        blocks: the parameters of each of the recipe's blocks, and of what is in none; empty: it names none.
        block_bytes: the most that one of the recipe's blocks kept; 0: it names none.
        temporary_bytes: what the step took at its peak besides parameters, gradients, state and what was kept.
        tables: the recipe's embedding tables; empty: it names none, or they are to be whole.
        stages: what each rank of a replica has of the model; empty: it is not in stages.
    """

    device: torch.device
    model_bytes: int
    optimizers: Sequence[TrainedParameters]
    kept_bytes: int
    blocks: Sequence[Sequence[nn.Parameter]]
    block_bytes: int
    temporary_bytes: int
    tables: Sequence[Table]
    stages: Sequence[StageMemory]


def measure_step(world: World, recipe: Recipe, options: RunOptions, ranks: int) -> MeasuredStep:
    """Make the first steps of a new run, until each optimizer has stepped, with the passes of one of `ranks` ranks.

    world: of one rank, or the pretended one of a replica (`pretend_replica`).
    """
    parts = find_data_parts(options, ranks)
    most = options.find_pass_sizes(recipe.batch_size, even_shares(parts)).training
    step = TorchStep(recipe, world, options)
    try:
        tables: list[Table] = []
        if ranks > 1 and options.exchange.tables == "dealt" and names_tables(recipe):
            tables = list(find_tables(recipe, step.model, step.world, options).values())
        blocks = list(find_blocks(recipe, step.model, "all").values()) if is_overridden(recipe, "blocks") else []
        watched = blocks if options.optimization.recompute is None else []
        kept = [KeptActivations(step.model, watched)]
        trained: set[nn.Parameter] = set()
        for number in range(MAX_STEPS):
            set_now(recipe, replace(recipe.now, step=number))
            skipped = make_step(step, most, kept[-1])
            trained |= {p for p in step.model.parameters() if p.grad is not None}
            if not skipped and all(trained & held for held in list_held(step).values()):
                break
            kept.append(KeptActivations(step.model, watched))
        kept_bytes = max(one.total_bytes for one in kept)
        temporary_bytes = max(0, measure_peak(step, most) - kept_bytes - sum(map(count_bytes, trained)))
        fresh, _ = make_optimizers(recipe, step.model)
        optimizers = [
            describe_optimizer(step, loss, trained, find_unit(fresh[loss], recipe, step.model))
            for loss in step.updater.optimizers
        ]
        groups = [list(block.parameters()) for block in blocks]
        inside = {p for group in groups for p in group}
        groups += [[p for p in step.model.parameters() if p not in inside]] if groups else []
        model_bytes = count_memory([*step.model.parameters(), *step.model.buffers()])
        block_bytes = max((size for one in kept for size in one.block_bytes), default=0)
        stages = measure_stages(step, parts) if options.pipeline.stages > 1 else []
        held = (kept_bytes, groups, block_bytes, temporary_bytes, tables, stages)
        return MeasuredStep(step.device, model_bytes, optimizers, *held)
    finally:
        step.close()


def find_data_parts(options: RunOptions, ranks: int) -> int:
    """Return into how many parts the ranks divide a batch: those of a replica may have the same one."""
    shape = options.find_grid_shape(ranks)
    return ranks // shape.replica_ranks if shape.same_batch else ranks


@contextlib.contextmanager
def pretend_replica(world: World, ranks: int) -> Iterator[World]:
    """Let this process be the last rank of a replica, whose scores count, within a block; others send anything."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    try:
        yield GridShape(ranks).divide_world(replace(world, rank=ranks - 1, size=ranks))
    finally:
        dist.destroy_process_group()


def make_step(step: TorchStep, most: int, kept: KeptActivations | None) -> bool:
    """Make a step of one pass; return whether a loss scale has skipped the update.

    Args:
        step: of a new run.
        most: examples of the pass, or as many as there are.
        kept: counts what the pass keeps; None: nobody does.
    """
    count, seed = min(most, step.examples["train"]), (step.options.data.seed, 0)
    step.start_step([1], 1.0)
    step.cast_votes(StepVotes(examples=count))
    batch = step.scorer.move_batch(step.splits.load_first_batch(most))
    with kept.record_forward() if kept is not None else contextlib.nullcontext():
        step.accumulate_gradients(batch, count, 1 / count, seed)
    step.all_reduce()
    return bool(step.apply_update(1.0, seed).get("skipped"))


def measure_peak(step: TorchStep, most: int) -> int:
    """Make another step; return the bytes that it took at most besides what outlives steps: on CPUs of the process."""
    step.updater.start_step([1], False)  # without the gradients of the one before
    if step.device.type == "cpu":
        memory = PeakMemory()
        make_step(step, most, None)
        return memory.measure_bytes()
    torch.cuda.reset_peak_memory_stats(step.device)
    before = torch.cuda.memory_allocated(step.device)
    make_step(step, most, None)
    return int(torch.cuda.max_memory_allocated(step.device)) - before


def list_held(step: TorchStep) -> dict[str, set[nn.Parameter]]:
    """Return the parameters of each loss's optimizer."""
    return {loss.name: set(loss.get_parameters()) for loss in step.updater.losses}


def find_unit(optimizer: torch.optim.Optimizer, recipe: Recipe, model: nn.Module) -> ShardUnit | None:
    """Return how an optimizer may be divided; None: it may not."""
    try:
        return find_shard_unit(optimizer, type(recipe).__name__, model).unit
    except UserError:
        return None


def describe_optimizer(
    step: TorchStep, loss: str, trained: Collection[nn.Parameter], unit: ShardUnit | None
) -> TrainedParameters:
    """Return what the optimizer of a loss has after the step, with the average of --ema."""
    held, optimizer = list_held(step)[loss], step.updater.optimizers[loss]
    parts = next(one.local_parts for one in step.updater.losses if one.name == loss)
    pieces = {} if parts is None else parts.pieces
    states = {p: dict(optimizer.state.get(pieces.get(p, [p])[0], {})) for p in held}
    if step.ema is not None:
        for p, average in zip(step.model.parameters(), step.ema.module.parameters(), strict=True):
            if p in held:
                states[p]["average"] = average.detach()
    named = [(name, p) for name, p in step.model.named_parameters() if p in held]
    return TrainedParameters(named, states, frozenset(held & set(trained)), unit)
