"""Evaluations without improvement of the recipe's `best`: what --patience and the schedule "plateau" count."""

from __future__ import annotations

import math

from hvdtrain.recipe.schedule import Plateau
from hvdtrain.training.position import Position


def count_evaluation(position: Position, best: tuple[str, str], plateau: Plateau | None) -> bool:
    """Count the last evaluation; return whether the learning rate falls after it.

    An improvement is any better value than the best so far; a value that is missing or not finite never is one.

    Args:
        position: whose counts are updated.
        best: the metric, and whether it is to be "min" or "max".
        plateau: of the schedule, if it is one.
    """
    metric, direction = best
    value = position.all_metrics().get(metric)
    if isinstance(value, (int, float)) and math.isfinite(value):
        known = position.best_value
        if known is None or (value < known if direction == "min" else value > known):
            position.best_value, position.since_best, position.since_drop = float(value), 0, 0
            return False
    position.since_best += 1
    position.since_drop += 1
    if plateau is None or position.since_drop < plateau.evaluations:
        return False
    position.since_drop = 0
    position.lr_drops += 1
    return True
