"""Memory of a rank in each layout of a recipe on many ranks: `hvdtrain plan`.

One process measures a step, with the training's own code: parameters, the optimizer's state after the step, and what
the forward pass of one micro-batch keeps. What a rank of many has of gradients and state, `hvdtrain.bench.layouts`
counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from hvdtrain.bench.activations import KeptActivations, count_memory
from hvdtrain.bench.layouts import (
    RankBytes,
    TrainedParameters,
    count_divided,
    count_first_rows,
    count_replicated,
    count_sharded,
)
from hvdtrain.comm.world import World
from hvdtrain.compression.spec import parse_compression
from hvdtrain.exchange.partition import ShardUnit
from hvdtrain.recipe.base import Recipe as AnyRecipe
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.framework import StepVotes
from hvdtrain.recipe.now import set_now
from hvdtrain.recipe.options import OptionValues
from hvdtrain.recipe.shares import even_shares
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import write_json
from hvdtrain.system.memory import PeakMemory
from hvdtrain.system.text import format_count
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recompute import find_blocks
from hvdtrain.torch.setup import make_optimizers
from hvdtrain.torch.shard_trial import find_shard_unit
from hvdtrain.torch.step import TorchStep
from hvdtrain.training.options import RunOptions, split_options

PLAIN = "data parallel"
MAX_STEPS = 30  # until all optimizers have stepped: a loss may be left out of some, and a loss scale skips some
MIB = 1 << 20


@dataclass(frozen=True)
class MemoryQuestion:
    """What is asked.

    Attributes:
        recipe_class: of the recipe.
        given: its options, and those of the run.
        ranks: that train it.
        limit: bytes that a rank may take; None: a GPU's, shared by as many ranks as it has.
        json_path: where to write the rows; None: nowhere.
    """

    recipe_class: type[AnyRecipe]
    given: OptionValues
    ranks: int
    limit: int | None
    json_path: Path | None


@dataclass(frozen=True)
class LayoutRow:
    """Bytes of the rank that has most; the fields are keys of the JSON file."""

    layout: str
    parameters: int = 0  # and buffers
    gradients: int = 0  # in the buckets in which they are sent, and what compression keeps
    state: int = 0  # the optimizer's, and the average of --ema
    activations: int = 0  # what the forward pass of a micro-batch keeps
    temporary: int = 0  # what a step of one rank takes at its peak besides all these
    refused: str = ""  # why the recipe or its options cannot be trained so; "": they can

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.state + self.activations + self.temporary

    def format_row(self, width: int, limit: int) -> str:
        """Return the row as text, in MiB. limit: bytes that a rank may take."""
        if self.refused:
            return f"{self.layout:{width}}  refused: {self.refused}"
        numbers = (self.parameters, self.gradients, self.state, self.activations, self.temporary, self.total)
        shown = "  ".join(f"{number / MIB:11.2f}" for number in numbers)
        return f"{self.layout:{width}}  {shown}  {'fits' if self.total <= limit else 'does not fit'}"


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
    """

    device: torch.device
    model_bytes: int
    optimizers: Sequence[TrainedParameters]
    kept_bytes: int
    blocks: Sequence[Sequence[nn.Parameter]]
    block_bytes: int
    temporary_bytes: int


def plan_memory(world: World, question: MemoryQuestion) -> list[LayoutRow]:
    """Print what a rank holds in each layout, and whether it fits; return the rows.

    Raises UserError for a recipe or options that cannot be trained, or whose memory is not known.
    """
    recipe, options = split_options(question.recipe_class, question.given)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{type(recipe).__name__} is a recipe for {recipe.framework}; expected one for torch")
    plain = measure_step(world, recipe, options, question.ranks)
    rows = [make_row(PLAIN, plain, options, question.ranks)]
    layouts: dict[str, dict[str, object]] = {}
    if question.ranks > 1:
        layouts["--shard optimizer"] = {"shard": "optimizer"}
        layouts["--shard optimizer --mirror 1"] = {"shard": "optimizer", "mirror": "1"}
    if question.ranks > 1 and plain.blocks:
        layouts["--shard model"] = {"shard": "model", "shard_ranks": question.ranks}
    rows += [plan_layout(name, plain, question, extra) for name, extra in layouts.items()]
    if is_overridden(recipe, "blocks") and options.optimization.recompute is None:
        extra = {"recompute": "all"}
        rows += plan_recomputed(world, question, plain, {"": {}, **layouts}, extra)
    limit = question.limit or find_gpu_memory(plain.device, question.ranks)
    passes = options.find_pass_sizes(recipe.batch_size, even_shares(question.ranks)).training
    width = max(len(row.layout) for row in rows)
    where = f"{format_count(question.ranks, 'rank')}, {plain.device.type}"
    title = f"{type(recipe).__name__}, {where}; passes of {format_count(passes, 'example')}; MiB of the rank with most"
    print(f"# {title}; {limit / MIB:.0f} MiB a rank")
    print(f"{'layout':{width}}   parameters    gradients        state  activations    temporary        total")
    for row in rows:
        print(row.format_row(width, limit))
    if question.json_path is not None:
        shown = [{**asdict(row), "total": row.total, "fits": not row.refused and row.total <= limit} for row in rows]
        write_json(question.json_path, {"title": title, "ranks": question.ranks, "limit": limit, "rows": shown})
    return rows


def plan_layout(layout: str, step: MeasuredStep, question: MemoryQuestion, extra: OptionValues) -> LayoutRow:
    """Return the row of a layout, whose options are `extra`, from a step that was measured without them."""
    try:
        _, options = split_options(question.recipe_class, {**question.given, **extra})
        return make_row(layout, step, options, question.ranks)
    except UserError as error:
        return LayoutRow(layout, refused=str(error))


def plan_recomputed(
    world: World,
    question: MemoryQuestion,
    plain: MeasuredStep,
    layouts: Mapping[str, Mapping[str, object]],
    extra: OptionValues,
) -> list[LayoutRow]:
    """Return the rows of layouts with --recompute all: in the backward pass one block's activations are there again."""
    name = "--recompute all"
    try:
        recipe, options = split_options(question.recipe_class, {**question.given, **extra})
        assert isinstance(recipe, Recipe)
        step = measure_step(world, recipe, options, question.ranks)
    except UserError as error:
        return [LayoutRow(name, refused=str(error))]
    block = plain.block_bytes
    step = replace(step, kept_bytes=step.kept_bytes + block, temporary_bytes=max(0, step.temporary_bytes - block))
    return [
        plan_layout(f"{layout} {name}".strip(), step, question, {**extra, **more}) for layout, more in layouts.items()
    ]


def make_row(layout: str, step: MeasuredStep, options: RunOptions, ranks: int) -> LayoutRow:
    """Return a layout's row. Raises UserError if the optimizer cannot be divided as the options say."""
    exchange, spec = options.exchange, parse_compression(options.compression.spec)
    total, model_bytes = RankBytes(0, 0), step.model_bytes
    if exchange.shard == "model":
        gathered = [sum(p.nbytes for p in group) for group in step.blocks]
        own = sum(count_first_rows(p, ranks) for group in step.blocks for p in group)
        # What is in no block stays whole for a step, and of the blocks one at a time.
        model_bytes += own - sum(gathered) + gathered[-1] + max(gathered[:-1])
    for held in step.optimizers:
        if exchange.shard == "model" and held.unit != "elements":
            raise UserError("the optimizer does not treat each value alone")
        if exchange.shard == "model":
            total += count_divided(held, ranks)
        elif not exchange.shards_optimizer:
            total += count_replicated(held, spec, exchange.bucket_bytes, ranks)
        elif held.unit is None:
            raise UserError("the optimizer cannot be divided among ranks")
        else:
            total += count_sharded(held, spec, exchange.bucket_bytes, ranks, exchange.is_mirrored)
    return LayoutRow(layout, model_bytes, total.gradients, total.state, step.kept_bytes, step.temporary_bytes)


def measure_step(world: World, recipe: Recipe, options: RunOptions, ranks: int) -> MeasuredStep:
    """Make the first steps of a new run, until each optimizer has stepped, with the passes of one of `ranks` ranks."""
    most = options.find_pass_sizes(recipe.batch_size, even_shares(ranks)).training
    step = TorchStep(recipe, world, options)
    try:
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
        temporary_bytes = max(0, measure_peak(step, most) - kept_bytes - sum(p.nbytes for p in trained))
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
        return MeasuredStep(step.device, model_bytes, optimizers, kept_bytes, groups, block_bytes, temporary_bytes)
    finally:
        step.close()


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
    states = {p: dict(optimizer.state.get(p, {})) for p in held}
    if step.ema is not None:
        for p, average in zip(step.model.parameters(), step.ema.module.parameters(), strict=True):
            if p in held:
                states[p]["average"] = average.detach()
    named = [(name, p) for name, p in step.model.named_parameters() if p in held]
    return TrainedParameters(named, states, frozenset(held & set(trained)), unit)


def find_gpu_memory(device: torch.device, ranks: int) -> int:
    """Return the bytes of a GPU's memory for each rank, if this host's GPUs are shared by all of them."""
    sharing = -(-ranks // torch.cuda.device_count())
    return int(torch.cuda.get_device_properties(device).total_memory) // sharing
