"""Steps in which not all ranks call `score` equally often, which a recipe with collectives in `score` cannot have."""

from __future__ import annotations

from hvdtrain.recipe import order
from hvdtrain.system.errors import UserError
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.plan import TrainingPlan


def count_passes(count: int, plan: TrainingPlan) -> list[int]:
    """Return by rank how many micro-batches a step of `count` examples has."""
    passes = []
    for rank in range(plan.ranks):
        bounds = [order.part_bounds(count, shard, plan.shards) for shard in _own_shards(plan, rank)]
        passes.append(sum(-(-(end - first) // plan.micro_batch) for first, end in bounds))
    return passes


def _own_shards(plan: TrainingPlan, rank: int) -> range:
    return range(*order.part_bounds(plan.shards, rank, plan.ranks))


def refuse_uneven_calls(recipe: str, plan: TrainingPlan, evaluated: int, at: Position) -> None:
    """Raise UserError if a rank would wait in a collective of `score` for one that does not call it.

    Args:
        recipe: its name.
        plan: of the run, on several ranks.
        evaluated: the number of evaluation examples.
        at: where the run begins.
    """
    steps = plan.total_steps - at.step
    for examples in (plan.examples - at.offset, plan.examples):
        full, rest = divmod(examples, plan.batch_size)
        sizes = [plan.batch_size] * (full > 0 and steps > 0) + [rest] * (rest > 0 and steps > full)
        for count in sizes:
            _refuse_uneven_passes(
                recipe, f"a step of {count} examples", count_passes(count, plan), "batch-size", plan.batch_size
            )
        steps -= full + (rest > 0)
    parts = [order.part_bounds(evaluated, rank, plan.ranks) for rank in range(plan.ranks)]
    passes = [-(-(end - first) // plan.eval_micro_batch) for first, end in parts]
    _refuse_uneven_passes(
        recipe, f"an evaluation of {evaluated} examples", passes, "micro-batch", plan.eval_micro_batch
    )


def _refuse_uneven_passes(recipe: str, what: str, passes: list[int], option: str, value: int) -> None:
    if len(set(passes)) == 1:
        return
    most, fewest = passes.index(max(passes)), passes.index(min(passes))
    raise UserError(
        f"{recipe}.score calls collectives, for which all ranks must call it equally often, and in {what} rank {most} "
        f"calls it {max(passes)} times and rank {fewest} {min(passes)} times: choose another --{option} than {value}, "
        "or let dataset() leave out the examples that are over"
    )
