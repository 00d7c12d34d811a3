"""What a run will do, computed before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from hvdtrain.ledger.made import MadeVersion
from hvdtrain.recipe import order, schedule
from hvdtrain.recipe.base import Recipe, is_overridden
from hvdtrain.recipe.order import Ids, Order
from hvdtrain.recipe.pruning import PruningSchedule, parse_pruning
from hvdtrain.recipe.ranges import Ranges, count_positions, list_ids, slice_ranges
from hvdtrain.recipe.schedule import Schedule
from hvdtrain.recipe.shares import EVEN, Shares, describe_shares
from hvdtrain.server.service_plan import ServicePlan
from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count
from hvdtrain.training.options import RunOptions
from hvdtrain.training.position import Position

MAX_CORNERS_SHOWN = 8  # of a schedule, in the line that describes it


@dataclass(frozen=True)
class RoundPlan:
    """Rounds of --local-steps."""

    steps: int  # of a round, at most
    first_step: int  # of the schedule's; gradients are exchanged in each step before it

    def describe(self, options: RunOptions) -> str:
        """Return a line to print."""
        clips = ", gradients clipped on each rank alone" if options.optimization.clip_norm else ""
        since = f" from step {self.first_step} on" if self.first_step else ""
        return (
            f"local     {format_count(self.steps, 'step')} a round{since}, outer {options.rounds.outer}{clips}: the "
            "number of ranks is part of the mathematics"
        )


@dataclass(frozen=True)
class TrainingPlan:
    """The sizes of a run; the same on every rank."""

    ranks: int
    shares: Shares  # of the batch, by rank
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
    pruning: PruningSchedule | None = None
    lr_text: str = ""  # of the recipe's `lr_factor`, which replaces the schedule; "": it has none
    rounds: RoundPlan | None = None
    service: ServicePlan | None = None  # of --server
    order_text: str = ""  # where an epoch's order comes from, if it is not shuffled

    def find_shard_bounds(self, count: int, rank: int) -> list[tuple[int, int]]:
        """Return where each of a rank's shards begins and ends in a step of `count` examples."""
        if not self.deterministic:
            return [order.share_bounds(count, rank, self.shares)]
        own = range(*order.share_bounds(self.shards, rank, self.shares))
        return [order.part_bounds(count, shard, self.shards) for shard in own]

    def count_passes(self, count: int) -> list[int]:
        """Return by rank how many micro-batches a step of `count` examples has."""
        bounds = [self.find_shard_bounds(count, rank) for rank in range(self.ranks)]
        return [sum(-(-(end - first) // self.micro_batch) for first, end in of_rank) for of_rank in bounds]

    def count_dealt(self) -> list[int]:
        """Return by rank how many examples of a whole batch it has."""
        bounds = [self.find_shard_bounds(self.batch_size, rank) for rank in range(self.ranks)]
        return [sum(end - first for first, end in of_rank) for of_rank in bounds]

    def deal_by(self, shares: Shares, options: RunOptions) -> TrainingPlan:
        """Return the plan with other shares."""
        sizes = options.find_pass_sizes(self.batch_size, shares)
        dealt = replace(self, shares=shares, micro_batch=sizes.training)
        return replace(dealt, max_passes=max(max(dealt.count_passes(count)) for count in dealt.step_sizes))

    @property
    def step_sizes(self) -> list[int]:
        """How many examples a step may have: the batch, or what is left of an epoch."""
        ragged = self.examples % self.batch_size
        return [self.batch_size, ragged] if ragged else [self.batch_size]

    def schedule_step(self, at: Position) -> int:
        """Return the step of the schedule: by the examples consumed, unless the run ends after a number of steps."""
        if not self.ends_with_epoch:
            return at.step
        # Steps of what is owed may follow on the last example of an epoch.
        return at.epoch * self.steps_per_epoch + min(at.offset // self.batch_size, self.steps_per_epoch - 1)

    def is_local(self, at: Position) -> bool:
        """Return whether gradients stay on their rank in the step at a position."""
        return self.rounds is not None and self.schedule_step(at) >= self.rounds.first_step


def make_training_plan(
    recipe: Recipe, options: RunOptions, examples: int, lr: float, shares: Shares, at: Position
) -> TrainingPlan:
    """Return the plan for `examples` training examples at learning rate `lr` on ranks with these shares, from `at` on.

    A run that is resumed with another batch size still ends with its last epoch.
    Raises UserError for a schedule that does not parse.
    """
    ranks = len(shares)
    batch_size = options.data.batch_per_rank * ranks if options.data.batch_per_rank else recipe.batch_size
    shards = options.exchange.virtual_shards if options.exchange.deterministic else ranks
    sizes = options.find_pass_sizes(recipe.batch_size, shares)
    steps_per_epoch = -(-examples // batch_size)
    whole = recipe.epochs * steps_per_epoch
    left = [0, 0] if at.epoch >= recipe.epochs else [examples - at.offset, count_positions(at.owed)]
    rest = sum(-(-count // batch_size) for count in left)
    rest += max(0, recipe.epochs - at.epoch - 1) * steps_per_epoch
    lr_scale = {"none": 1.0, "linear": float(ranks), "sqrt": math.sqrt(ranks)}[options.optimization.scale_lr]
    plan = TrainingPlan(
        ranks=ranks,
        shares=shares,
        examples=examples,
        batch_size=batch_size,
        shards=shards,
        micro_batch=sizes.training,
        eval_micro_batch=sizes.evaluation,
        deterministic=options.exchange.deterministic,
        max_passes=1,
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
        pruning=parse_pruning(prune, steps_per_epoch) if (prune := options.optimization.prune) is not None else None,
        rounds=plan_rounds(options, options.data.steps or whole, steps_per_epoch),
    )
    return plan.deal_by(shares, options)


def plan_rounds(options: RunOptions, total_steps: int, steps_per_epoch: int) -> RoundPlan | None:
    """Return the rounds of a run; None without --local-steps. Raises UserError if it would end before the first."""
    if options.rounds.local_steps is None:
        return None
    after = options.rounds.local_after
    first_step = schedule.parse_run_position("--local-after", after, total_steps, steps_per_epoch)
    if first_step >= total_steps:
        raise UserError(f"--local-after {after} is step {first_step}, and the run has {total_steps}: begin earlier")
    return RoundPlan(options.rounds.local_steps, first_step)


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
    batch = [
        f"batch     {plan.batch_size} global{weak} = {format_count(plan.ranks, 'rank')} x "
        f"{plan.max_passes} pass{'es' * (plan.max_passes > 1)} x at most {plan.micro_batch}",
    ]
    if plan.service is not None:
        way, batch = "by messages", plan.service.describe()
    return [
        f"data      {length}" + (f", the last of {ragged} examples" if ragged else ""),
        *batch,
        *describe_dealing(plan, options),
        f"steps     {plan.total_steps} in {format_count(plan.epochs, 'epoch')}",
        f"lr        {plan.lr_text or f'{plan.schedule.text}: ' + ', '.join(shown)}{scaled}",
        f"gradient  {way}, compression {options.compression.spec}, amp {options.optimization.amp}"
        + (f", clipped to norm {options.optimization.clip_norm:g}" if options.optimization.clip_norm else "")
        + (f", EMA {options.optimization.ema:g}" if options.optimization.ema else ""),
        *([plan.pruning.describe(plan.total_steps)] if plan.pruning is not None else []),
        *([plan.rounds.describe(options)] if plan.rounds is not None else []),
    ]


def describe_dealing(plan: TrainingPlan, options: RunOptions) -> list[str]:
    """Return a line on how the batch is dealt, unless it is dealt evenly as always."""
    if options.data.shares == EVEN:
        return []
    dealt = plan.count_dealt()
    return [
        f"shares    {describe_shares(plan.shares)} (--shares {options.data.shares}), "
        f"{min(dealt)} to {max(dealt)} of {plan.batch_size} examples"
    ]


@dataclass(frozen=True)
class StepShare:
    """A rank's share of a step."""

    step_examples: int  # of the step, on all ranks
    first_index: int  # index in the global batch of this rank's first example
    shards: list[list[Ids]]  # of each of this rank's shards, the micro-batches
    owed: Ranges = field(default_factory=list)  # positions that the step is made of, if they are not the next ones
    made: MadeVersion | None = None  # what it is made of, by a parameter server

    @property
    def own_examples(self) -> int:
        """How many examples this rank has."""
        return sum(len(ids) for shard in self.shards for ids in shard)


def iterate_step_shares(
    plan: TrainingPlan, epoch_order: Order, offset: int, rank: int, owed: Ranges | None = None
) -> Iterator[StepShare]:
    """Yield a rank's share of each step of an epoch, from example `offset` of its order on.

    owed: what the first steps are made of, before the order goes on.
    """

    def deal(ids: Ids, of: Ranges) -> StepShare:
        bounds = plan.find_shard_bounds(len(ids), rank)
        shards = [order.split_micro_batches(ids[first:end], plan.micro_batch) for first, end in bounds]
        return StepShare(len(ids), bounds[0][0] if bounds else 0, shards, of)

    for first in range(0, count_positions(owed or []), plan.batch_size):
        of = slice_ranges(owed or [], first, first + plan.batch_size)
        yield deal(list_ids(epoch_order, of), of)
    for ids in order.cut_batches(epoch_order, plan.batch_size, offset):
        yield deal(ids, [])


def is_due(step: int, every: int | None, epoch_ends: bool) -> bool:
    """Whether something done every N steps, or else once an epoch, is due."""
    return step % every == 0 if every else epoch_ends
