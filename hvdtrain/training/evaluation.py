"""The evaluation: each of its examples once, on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.recipe import order
from hvdtrain.recipe.base import Recipe, is_overridden
from hvdtrain.recipe.framework import Chunk
from hvdtrain.recipe.metrics import MetricValue
from hvdtrain.recipe.order import Ids
from hvdtrain.system import activity
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.recipe_errors import name_call
from hvdtrain.system.text import format_count
from hvdtrain.training.hooks import should_end
from hvdtrain.training.outputs import OutputCollector, summarise_outputs
from hvdtrain.training.patience import count_evaluation
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation


def evaluate_model(generation: Generation, position: Position) -> None:
    """Evaluate the model on each evaluation set that has examples: the first is `position.eval`, then come `evals`."""
    run = generation.run
    generation.set_now(position, training=False)
    found = {name: evaluate_set(generation, name) for name in run.recipe.evals if run.step.examples[name]}
    position.eval = found.pop(run.recipe.evals[0], {})
    position.evals = found


def check_best_found(recipe: Recipe, position: Position) -> None:
    """Raise UserError if `best` names no metric of an evaluation: of what `summarise` returns, it is known now only."""
    metrics, (metric, _) = position.all_metrics(), recipe.best
    if metric not in metrics:
        raise UserError(
            f"{type(recipe).__name__}.best: there is no metric {metric!r}{suggest_nearest(metric, list(metrics))}"
        )


def conclude_evaluation(generation: Generation, position: Position) -> None:
    """Count the evaluation, and let `position.ended` be why the training ends with it, if it does."""
    run, (metric, _) = generation.run, generation.run.recipe.best
    ends = should_end(generation, position)
    # From here on without collectives: if a rank is lost before, the evaluation is repeated.
    position.evaluated = position.step
    patience, plan = run.options.data.patience, generation.plan
    plateau = plan.schedule.plateau if not plan.lr_text else None
    if count_evaluation(position, run.recipe.best, plateau) and plateau is not None:
        waited = f"{format_count(plateau.evaluations, 'evaluation')} without a better {metric}"
        run.report.print_lines([f"lr        {waited}: times {plateau.ratio:g} from step {position.step} on"])
    if ends:
        position.ended = f"{name_call(run.recipe, 'evaluated()')} returned True"
    elif patience is not None and position.since_best >= patience:
        position.ended = f"{format_count(position.since_best, 'evaluation')} without a better {metric} (--patience)"
    if position.ended:
        run.report.print_lines(
            [f"ended     at step {position.step} of {generation.plan.total_steps}: {position.ended}"]
        )


def evaluate_set(generation: Generation, name: str) -> dict[str, MetricValue]:
    """Return the metrics over an evaluation set: sums over ranks, divided by the number of its examples."""
    step, plan, world = generation.run.step, generation.plan, generation.world
    activity.enter_activity("loading a batch of the evaluation")
    count = step.examples[name]
    sums, recipe = np.zeros(step.layout.num_sums), generation.run.recipe
    collector = OutputCollector(recipe) if is_overridden(recipe, "summarise") else None
    parts, now = list(iterate_evaluation_chunks(count, plan, world.data_rank)), generation.run.recipe.now
    batches = step.load_batches(name, (Chunk(ids, now, int(ids[0])) for ids in parts if len(ids)), 0)
    for part in parts:
        if not len(part):
            step.join_evaluation(name)
            continue
        ids, batch = next(batches)
        activity.enter_activity("evaluating")
        own = step.evaluate_batch(batch, len(ids), (generation.run.options.data.seed, -1, int(ids[0])))
        if world.counts_examples:
            sums += own
        if collector is not None:
            outputs = step.compute_outputs(batch, len(ids))  # by all ranks that hold the model together
            if world.counts_examples:
                collector.add_batch(ids, outputs)
        activity.enter_activity("loading a batch of the evaluation")
    activity.enter_activity("evaluating")
    values = generation.run.metrics.compute_agreed(collectives.sum_float64(sums, "evaluation"), count)
    return values if collector is None else values | summarise_outputs(collector, count)


def iterate_evaluation_chunks(count: int, plan: TrainingPlan, rank: int) -> Iterator[Ids]:
    """Yield the ids of each pass of a rank over `count` evaluation examples; all ranks together have each id once.

    All ranks make equally many passes, and the examples of a pass, on all ranks together, are the same on any number of
    ranks: a `score` that gathers them sees the same ones. If there are fewer than ranks, some have no ids. In a
    deterministic run each pass is one rank's.
    """
    if plan.deterministic:
        passes = -(-count // plan.eval_micro_batch)
        for number in range(*order.part_bounds(passes, rank, plan.ranks)):
            yield np.arange(*order.part_bounds(count, number, passes))
        return
    passes = -(-count // (plan.eval_micro_batch * plan.ranks))
    for number in range(passes):
        start, end = order.part_bounds(count, number, passes)
        first, last = order.part_bounds(end - start, rank, plan.ranks)
        yield np.arange(start + first, start + last)
