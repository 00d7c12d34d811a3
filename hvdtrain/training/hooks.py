"""The recipe's own methods that the loop calls on all ranks."""

from __future__ import annotations

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.recipe.base import is_overridden
from hvdtrain.system import activity
from hvdtrain.system.errors import RunError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation


def ask_to_end(generation: Generation, position: Position) -> bool:
    """Call the recipe's `evaluated` on all ranks, and return whether it ends the training.

    Raises:
        RecipeError: on all ranks, for what it raises on one.
        RunError: on all ranks, if it returns something else than True, False or None, or not the same on all.
    """
    run = generation.run
    if not is_overridden(run.recipe, "evaluated"):
        return False
    activity.enter_activity("calling evaluated")
    model = run.step.evaluated_model((run.options.data.seed, -2, position.step))
    metrics = position.all_metrics()

    def call_evaluated() -> bool:
        with in_recipe(run.recipe, "evaluated()"):
            answer = run.recipe.evaluated(model, metrics)
        if answer is not None and not isinstance(answer, (bool, np.bool_)):
            call, kind = name_call(run.recipe, "evaluated()"), type(answer).__name__
            raise RunError(f"{call} returned {answer!r}, {kind}; expected True to end the training, else False")
        return bool(answer)

    ends = collectives.on_all_ranks("evaluated", call_evaluated)
    answers = collectives.gather_json(ends, "evaluated.answers")
    if len(set(answers)) > 1:
        call, first, other = name_call(run.recipe, "evaluated()"), answers.index(True), answers.index(False)
        raise RunError(
            f"{call} returned True on rank {first} and False on rank {other} at step {position.step}: it must return "
            "the same on all ranks, for example by nothing but the metrics"
        )
    return ends
