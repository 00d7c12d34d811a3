"""Recipes with collectives in `score`: refuse what would hang, or give another result than on one rank."""

from __future__ import annotations

from collections.abc import Mapping

from hvdtrain.recipe import order
from hvdtrain.system.errors import UserError
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.position import Position


def refuse_several_passes(recipe: str, plan: TrainingPlan) -> None:
    """Raise UserError if a step has several passes, in each of which `score` would see a part of the batch only."""
    if plan.max_passes > 1:
        raise UserError(
            f"{recipe}.score exchanges examples with the other ranks (all_gather, all_reduce or SyncBatchNorm), so a "
            f"step must be one pass; with --micro-batch {plan.micro_batch} it has up to {plan.max_passes}: leave out "
            "--micro-batch, or choose a smaller --batch-size"
        )


def refuse_uneven_calls(recipe: str, plan: TrainingPlan, examples: Mapping[str, int], position: Position) -> None:
    """Raise UserError if a rank would wait in a collective of `score` for one that does not call it.

    Args:
        recipe: its name.
        plan: of the run.
        examples: the number of examples of each split.
        position: the beginning of the run.
    """
    remaining_steps = plan.total_steps - position.step
    for epoch_examples in (plan.examples - position.offset, plan.examples):
        full, rest = divmod(epoch_examples, plan.batch_size)
        sizes = [plan.batch_size] * (full > 0 and remaining_steps > 0) + [rest] * (rest > 0 and remaining_steps > full)
        for count in sizes:
            passes = plan.count_passes(count)
            _refuse_uneven_passes(recipe, f"a step of {count} examples", passes, "batch-size", plan.batch_size)
        remaining_steps -= full + (rest > 0)
    for count in (count for split, count in examples.items() if split != "train"):
        parts = [order.part_bounds(count, rank, plan.ranks) for rank in range(plan.ranks)]
        passes = [-(-(end - first) // plan.eval_micro_batch) for first, end in parts]
        what = f"an evaluation of {count} examples"
        _refuse_uneven_passes(recipe, what, passes, "micro-batch", plan.eval_micro_batch)


def _refuse_uneven_passes(recipe: str, what: str, passes: list[int], option: str, value: int) -> None:
    if len(set(passes)) == 1:
        return
    most, fewest = passes.index(max(passes)), passes.index(min(passes))
    raise UserError(
        f"{recipe}.score calls collectives, so all ranks must call it equally often; in {what} rank {most} calls it "
        f"{max(passes)} times and rank {fewest} {min(passes)} times: choose another --{option} than {value}, or let "
        "dataset() leave out the last examples"
    )
