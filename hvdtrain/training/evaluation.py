"""The evaluation: each of its examples once, on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.recipe import order
from hvdtrain.recipe.metrics import to_plain_values
from hvdtrain.recipe.order import Ids
from hvdtrain.system import activity
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation


def evaluate_model(generation: Generation, position: Position) -> None:
    """Set `position.eval` to the metrics over the evaluation examples: sums over ranks, divided by their number."""
    step, plan = generation.run.step, generation.plan
    activity.enter_activity("loading a batch of the evaluation")
    count = step.examples["eval"]
    sums = np.zeros(step.layout.num_sums)
    for ids, batch in step.load_batches("eval", iterate_evaluation_chunks(count, plan, generation.world.rank), 0):
        activity.enter_activity("evaluating")
        sums += step.evaluate_batch(batch, len(ids), (generation.run.options.data.seed, -1, int(ids[0])))
        activity.enter_activity("loading a batch of the evaluation")
    activity.enter_activity("evaluating")
    position.eval = to_plain_values(step.layout.means(collectives.sum_float64(sums, "evaluation"), count))
    position.evaluated = position.step


def iterate_evaluation_chunks(count: int, plan: TrainingPlan, rank: int) -> Iterator[Ids]:
    """Yield the ids of each pass of a rank over `count` evaluation examples; all ranks together have each id once.

    A deterministic run makes the same passes on any number of ranks; otherwise each rank has equally many.
    """
    passes = -(-count // plan.eval_micro_batch)
    if not plan.deterministic:
        passes = -(-passes // plan.ranks) * plan.ranks
    for number in range(*order.part_bounds(passes, rank, plan.ranks)):
        first, end = order.part_bounds(count, number, passes)
        if first < end:
            yield np.arange(first, end)
