"""The evaluation: each of its examples once, on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.recipe import order
from hvdtrain.recipe.framework import Chunk
from hvdtrain.recipe.metrics import MetricValue
from hvdtrain.recipe.order import Ids
from hvdtrain.system import activity
from hvdtrain.system.recipe_errors import name_call
from hvdtrain.system.text import format_count
from hvdtrain.training.hooks import ask_to_end
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


def conclude_evaluation(generation: Generation, position: Position) -> None:
    """Count the evaluation, and let `position.ended` be why the training ends with it, if it does."""
    run, (metric, _) = generation.run, generation.run.recipe.best
    ends = ask_to_end(generation, position)
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
    step, plan = generation.run.step, generation.plan
    activity.enter_activity("loading a batch of the evaluation")
    count = step.examples[name]
    sums = np.zeros(step.layout.num_sums)
    parts, now = list(iterate_evaluation_chunks(count, plan, generation.world.rank)), generation.run.recipe.now
    batches = step.load_batches(name, (Chunk(ids, now, int(ids[0])) for ids in parts if len(ids)), 0)
    for part in parts:
        if not len(part):
            step.join_evaluation(name)
            continue
        ids, batch = next(batches)
        activity.enter_activity("evaluating")
        sums += step.evaluate_batch(batch, len(ids), (generation.run.options.data.seed, -1, int(ids[0])))
        activity.enter_activity("loading a batch of the evaluation")
    activity.enter_activity("evaluating")
    return generation.run.metrics.compute_agreed(collectives.sum_float64(sums, "evaluation"), count)


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
