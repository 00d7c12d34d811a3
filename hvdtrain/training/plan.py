"""What a run will do, computed before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hvdtrain.recipe import order
from hvdtrain.recipe.base import Recipe, is_overridden
from hvdtrain.recipe.order import Ids, Order
from hvdtrain.system.text import format_count
from hvdtrain.training import schedule
from hvdtrain.training.options import RunOptions
from hvdtrain.training.position import Position
from hvdtrain.training.schedule import Schedule

MAX_CORNERS_SHOWN = 8  # of a schedule, in the line that describes it


@dataclass(frozen=True)
class TrainingPlan:
    """The sizes of a run; the same on every rank."""

    ranks: int
    examples: int
    batch_size: int  # global
    shards: int  # parts of the global batch whose gradients are computed alone: one per rank, unless deterministic
    micro_batch: int  # most examples per pass
    eval_micro_batch: int  # most examples per rank and pass of an evaluation
    deterministic: bool
    max_passes: int  # most passes per rank and step
    steps_per_epoch: int
    total_steps: int
    epochs: int
    ends_with_epoch: bool  # ends with the last epoch, not after a number of steps
    lr: float  # after scaling, before the schedule
    lr_scale: float
    schedule: Schedule
    lr_text: str = ""  # of the recipe's `lr_factor`, which replaces the schedule; "": it has none
    order_text: str = ""  # where an epoch's order comes from, if it is not shuffled

    def schedule_step(self, at: Position) -> int:
        """Return the step of the schedule: by the examples consumed, unless the run ends after a number of steps."""
        return at.epoch * self.steps_per_epoch + at.offset // self.batch_size if self.ends_with_epoch else at.step


def make_training_plan(
    recipe: Recipe, options: RunOptions, examples: int, lr: float, ranks: int, at: Position
) -> TrainingPlan:
    """Return the plan for `examples` training examples at learning rate `lr` on `ranks` ranks, from `at` on.

    A run that is resumed with another batch size still ends with its last epoch.
    Raises UserError for a schedule that does not parse.
    """
    batch_size = options.data.batch_per_rank * ranks if options.data.batch_per_rank else recipe.batch_size
    per_rank = -(-batch_size // ranks)
    shards = options.exchange.virtual_shards if options.exchange.deterministic else ranks
    per_shard = -(-batch_size // shards)
    micro_batch = min(options.data.micro_batch or per_shard, per_shard)
    steps_per_epoch = -(-examples // batch_size)
    whole = recipe.epochs * steps_per_epoch
    rest = 0 if at.epoch >= recipe.epochs else -(-(examples - at.offset) // batch_size)
    rest += max(0, recipe.epochs - at.epoch - 1) * steps_per_epoch
    lr_scale = {"none": 1.0, "linear": float(ranks), "sqrt": math.sqrt(ranks)}[options.optimization.scale_lr]
    return TrainingPlan(
        ranks=ranks,
        examples=examples,
        batch_size=batch_size,
        shards=shards,
        micro_batch=micro_batch,
        eval_micro_batch=micro_batch
        if options.exchange.deterministic
        else min(options.data.micro_batch or per_rank, per_rank),
        deterministic=options.exchange.deterministic,
        max_passes=-(-shards // ranks) * -(-per_shard // micro_batch),
        steps_per_epoch=steps_per_epoch,
        total_steps=options.data.steps or at.step + rest,
        epochs=-(-options.data.steps // steps_per_epoch) if options.data.steps else recipe.epochs,
        ends_with_epoch=options.data.steps is None,
        lr=lr * lr_scale,
        lr_scale=lr_scale,
        lr_text=f"{lr * lr_scale:.4g} times {type(recipe).__name__}.lr_factor(now)"
        if is_overridden(recipe, "lr_factor")
        else "",
        schedule=schedule.parse_schedule(recipe.schedule, options.data.steps or whole, steps_per_epoch),
    )


def describe_training_plan(plan: TrainingPlan, options: RunOptions) -> list[str]:
    """Return the plan in a few lines to print."""
    ragged = plan.examples % plan.batch_size
    weak = f" ({options.data.batch_per_rank} x {plan.ranks} ranks)" if options.data.batch_per_rank else ""
    scaled = f" (times {plan.lr_scale:g}, --scale-lr {options.optimization.scale_lr})" if plan.lr_scale != 1 else ""
    way = (
        f"deterministic {plan.shards} virtual shards"
        if options.exchange.deterministic
        else f"{options.exchange.kind} exchange"
    )
    shown = [f"{plan.lr * plan.schedule.factor(step):.4g} at step {step}" for step in plan.schedule.corners]
    if len(shown) > MAX_CORNERS_SHOWN:
        shown[MAX_CORNERS_SHOWN - 1 : -1] = ["..."]
    source = f" {plan.order_text}" if plan.order_text else ""
    length = f"{plan.examples} examples{source}, {plan.steps_per_epoch} steps an epoch"
    if plan.examples == order.MAX_EXAMPLES:
        length, ragged = f"examples{source}, of unknown length", 0
    return [
        f"data      {length}" + (f", the last of {ragged} examples" if ragged else ""),
        f"batch     {plan.batch_size} global{weak} = {format_count(plan.ranks, 'rank')} x "
        f"{plan.max_passes} pass{'es' * (plan.max_passes > 1)} x at most {plan.micro_batch}",
        f"steps     {plan.total_steps} in {format_count(plan.epochs, 'epoch')}",
        f"lr        {plan.lr_text or f'{plan.schedule.text}: ' + ', '.join(shown)}{scaled}",
        f"gradient  {way}, compression {options.compression.spec}, amp {options.optimization.amp}"
        + (f", clipped to norm {options.optimization.clip_norm:g}" if options.optimization.clip_norm else "")
        + (f", EMA {options.optimization.ema:g}" if options.optimization.ema else ""),
    ]


@dataclass(frozen=True)
class StepShare:
    """A rank's share of a step."""

    step_examples: int  # of the step, on all ranks
    first_index: int  # index in the global batch of this rank's first example
    shards: list[list[Ids]]  # of each of this rank's shards, the micro-batches


def iterate_step_shares(plan: TrainingPlan, epoch_order: Order, offset: int, rank: int) -> Iterator[StepShare]:
    """Yield a rank's share of each step of an epoch, from example `offset` of its order on."""
    own = range(*order.part_bounds(plan.shards, rank, plan.ranks))
    for ids in order.cut_batches(epoch_order, plan.batch_size, offset):
        bounds = [order.part_bounds(len(ids), shard, plan.shards) for shard in own]
        shards = [order.split_micro_batches(ids[first:end], plan.micro_batch) for first, end in bounds]
        yield StepShare(len(ids), bounds[0][0] if bounds else 0, shards)
