"""The recipe's own methods that the loop calls on all ranks."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.now import Now
from hvdtrain.system import activity
from hvdtrain.system.errors import RunError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation


def should_end(generation: Generation, position: Position) -> bool:
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


def find_lr_factor(generation: Generation, position: Position, now: Now) -> tuple[float, int]:
    """Return what multiplies the learning rate of the step to come, and a 32-bit hash of it.

    It is the schedule's, with hash 0, or what the recipe's `lr_factor` returns.

    Raises:
        RecipeError: for what `lr_factor` raises.
        RunError: if it returns something else than a finite number from 0 on.
    """
    recipe, plan = generation.run.recipe, generation.plan
    if not is_overridden(recipe, "lr_factor"):
        return plan.schedule.lr_factor(plan.schedule_step(position), position.lr_drops), 0
    with in_recipe(recipe, "lr_factor()"):
        answer = recipe.lr_factor(now)
    try:
        factor = math.nan if answer is None or isinstance(answer, (str, bool)) else float(answer)
    except (TypeError, ValueError):
        factor = math.nan
    if not math.isfinite(factor) or factor < 0:
        call = name_call(recipe, "lr_factor()")
        raise RunError(f"{call} returned {answer!r} for step {now.step + 1}; expected a finite number from 0 on")
    return factor, zlib.crc32(struct.pack("<d", factor))


def check_lr_factor(generation: Generation, position: Position, factor: float, is_same: bool) -> None:
    """Raise RunError on all ranks unless `lr_factor` has returned the same on all.

    Args:
        generation: the ranks.
        position: before the step.
        factor: this rank's.
        is_same: whether the hashes of all ranks add up to that of this one times the ranks: those that differ do not,
            but for a coincidence of probability 2^-32.
    """
    if not is_same:
        call, rank = name_call(generation.run.recipe, "lr_factor()"), generation.world.rank
        raise RunError(
            f"{call} returned {factor!r} on rank {rank} for step {position.step + 1}, and another number on another "
            "rank: it must return the same on all"
        )
