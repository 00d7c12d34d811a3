"""Memory of a rank in each layout of a recipe on many ranks: `hvdtrain plan`.

One process measures a step, with the training's own code: parameters, the optimizer's state after the step, and what
the forward pass of one micro-batch keeps. What a rank of many has of gradients and state, `hvdtrain.bench.layouts`
counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hvdtrain.bench.layouts import (
    RankBytes,
    count_dealt,
    count_divided,
    count_first_rows,
    count_replicated,
    count_sharded,
)
from hvdtrain.bench.measured_step import MeasuredStep, find_data_parts, measure_step, pretend_replica
from hvdtrain.comm.world import World
from hvdtrain.compression.spec import parse_compression
from hvdtrain.recipe.base import Recipe as AnyRecipe
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.options import OptionValues
from hvdtrain.recipe.shares import even_shares
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import write_json
from hvdtrain.system.text import format_count
from hvdtrain.torch.recipe import Recipe
from hvdtrain.training.options import RunOptions, split_options

PLAIN = "data parallel"
MIB = 1 << 20


@dataclass(frozen=True)
class MemoryQuestion:
    """What is asked.

    Attributes:
        recipe_class: of the recipe.
        given: its options, and those of the run.
        ranks: that train it.
        stages: that a replica is to have, in layouts with stages; 1: there are none.
        tensor: ranks that are to divide layers, likewise.
        limit: bytes that a rank may take; None: a GPU's, shared by as many ranks as it has.
        json_path: where to write the rows; None: nowhere.
    """

    recipe_class: type[AnyRecipe]
    given: OptionValues
    ranks: int
    stages: int
    tensor: int
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


def plan_memory(world: World, question: MemoryQuestion) -> list[LayoutRow]:
    """Print what a rank holds in each layout, and whether it fits; return the rows.

    Raises UserError for a recipe or options that cannot be trained, or whose memory is not known.
    """
    recipe, options = split_options(question.recipe_class, question.given)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{type(recipe).__name__} is a recipe for {recipe.framework}; expected one for torch")
    plain = measure_step(world, recipe, options, question.ranks)
    rows = [make_row(PLAIN, plain, options, question.ranks)]
    layouts = list_layouts(question, plain)
    rows += [plan_layout(name, plain, question, extra) for name, extra in layouts.items()]
    whole = {"tables": "whole"} if plain.tables else {}
    if question.stages > 1:
        rows.append(plan_divided(f"--stages {question.stages}", world, question, {"stages": question.stages, **whole}))
    if question.tensor > 1 and is_overridden(recipe, "split_plan"):
        rows.append(plan_divided(f"--tensor {question.tensor}", world, question, {"tensor": question.tensor, **whole}))
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


def list_layouts(question: MemoryQuestion, plain: MeasuredStep) -> dict[str, dict[str, object]]:
    """Return the options of layouts besides data parallel whose ranks need no other measured step, by their names."""
    layouts: dict[str, dict[str, object]] = {}
    if question.ranks > 1:
        layouts["--shard optimizer"] = {"shard": "optimizer"}
        layouts["--shard optimizer --mirror 1"] = {"shard": "optimizer", "mirror": "1"}
    if question.ranks > 1 and plain.blocks:
        layouts["--shard model"] = {"shard": "model", "shard_ranks": question.ranks}
    if plain.tables:
        whole: dict[str, dict[str, object]] = {"": {}, **layouts}
        layouts = {f"--tables whole {name}".strip(): {"tables": "whole", **extra} for name, extra in whole.items()}
    return layouts


def plan_divided(layout: str, world: World, question: MemoryQuestion, extra: OptionValues) -> LayoutRow:
    """Return the row of a layout in which ranks divide the model, from a step that is measured with its options."""
    try:
        recipe, options = split_options(question.recipe_class, {**question.given, **extra})
        assert isinstance(recipe, Recipe)
        replica = options.find_grid_shape(1).replica_ranks
        if question.ranks % replica:
            raise UserError(f"{question.ranks} ranks are no whole replicas of {replica}")
        with contextlib.ExitStack() as stack:
            if options.model.tensor > 1:
                world = stack.enter_context(pretend_replica(world, replica))
            step = measure_step(world, recipe, options, question.ranks)
            return make_row(layout, step, options, question.ranks)
    except UserError as error:
        return LayoutRow(layout, refused=str(error))


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
    if step.stages:
        return make_stage_row(layout, step, options, ranks)
    exchange, spec = options.exchange, parse_compression(options.compression.spec)
    dealt = step.tables if exchange.tables == "dealt" else ()
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
            dense = held.select({p for _, p in held.named} - {table.weight for table in dealt})
            total += count_replicated(dense, spec, exchange.bucket_bytes, find_data_parts(options, ranks))
        elif held.unit is None:
            raise UserError("the optimizer cannot be divided among ranks")
        else:
            total += count_sharded(held, spec, exchange.bucket_bytes, ranks, exchange.is_mirrored)
    if dealt:  # by the only optimizer
        weights, own_rows = max(count_dealt(step.optimizers[0], dealt, ranks), key=lambda one: one[0] + one[1].total)
        model_bytes += weights - sum(table.weight.nbytes for table in dealt)
        total += own_rows
    return LayoutRow(layout, model_bytes, total.gradients, total.state, step.kept_bytes, step.temporary_bytes)


def make_stage_row(layout: str, step: MeasuredStep, options: RunOptions, ranks: int) -> LayoutRow:
    """Return the row of a model in stages: of the rank of a replica that has most."""
    spec, (held,), parts = parse_compression(options.compression.spec), step.optimizers, find_data_parts(options, ranks)
    if held.unit is None:
        raise UserError("the optimizer updates parameters by what others have")
    rows = []
    for stage in step.stages:
        own = count_replicated(held.select(stage.parameters), spec, options.exchange.bucket_bytes, parts)
        rows.append(
            LayoutRow(layout, stage.model_bytes, own.gradients, own.state, stage.kept_bytes, step.temporary_bytes)
        )
    return max(rows, key=lambda row: row.total)


def find_gpu_memory(device: torch.device, ranks: int) -> int:
    """Return the bytes of a GPU's memory for each rank, if this host's GPUs are shared by all of them."""
    sharing = -(-ranks // torch.cuda.device_count())
    return int(torch.cuda.get_device_properties(device).total_memory) // sharing
