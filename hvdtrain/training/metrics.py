"""The metrics of a recipe: the means of its scores, and what its `metrics` computes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.recipe import base
from hvdtrain.recipe.metrics import MetricMeans, MetricValue, ScoreLayout, check_column_names, to_plain_values
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call


class RecipeMetrics:
    """Computes metrics of exact sums."""

    def __init__(self, recipe: base.Recipe, layout: ScoreLayout) -> None:
        self.recipe, self.layout = recipe, layout
        self.has_own = base.is_overridden(recipe, "metrics")

    def compute(self, sums: Sequence[float] | NDArray[np.float64], count: int) -> dict[str, MetricValue]:
        """Return the metrics of the scores' sums over `count` examples.

        Raises RecipeError for what the recipe's `metrics` raises, UserError for what it should not return.
        """
        return self.extend_means(self.layout.means(np.asarray(sums, np.float64), count))

    def extend_means(self, means: MetricMeans) -> dict[str, MetricValue]:
        """Return means, and what the recipe's `metrics` makes of them: an equal name replaces."""
        values = to_plain_values(means)
        if not self.has_own:
            return values
        with np.errstate(all="ignore"), in_recipe(self.recipe, "metrics()"):
            found = self.recipe.metrics(means)
        return values | parse_values(self.recipe, "metrics()", found)

    def compute_agreed(self, sums: NDArray[np.float64], count: int) -> dict[str, MetricValue]:
        """Return the same metrics on all ranks, whose sums are the same: rank 0's. All ranks call it."""
        if not self.has_own:
            return self.compute(sums, count)
        values = collectives.on_all_ranks("evaluation.metrics", lambda: self.compute(sums, count))
        agreed: dict[str, MetricValue] = collectives.broadcast_json(values, "evaluation.metrics.values")
        return agreed

    def no_values(self, loss: float) -> dict[str, MetricValue]:
        """Return what a row has if all its steps were skipped: no metric but the loss of the last of them."""
        count = self.layout.num_sums
        nothing = to_plain_values(self.layout.means(np.zeros(count), 0))
        return nothing | {"loss": loss}


def parse_values(recipe: base.Recipe, call: str, found: Any) -> dict[str, MetricValue]:
    """Return what a recipe's method returned as plain data. Raises UserError unless it is a dict of real numbers.

    call: of the method, e.g. "metrics()".
    """
    name = name_call(recipe, call)
    if not isinstance(found, Mapping):
        hint = ": does it lack a return?" if found is None else ""
        raise UserError(f"{name} returned {type(found).__name__}; expected a dict of numbers and vectors{hint}")
    check_column_names(name, found)
    return {key: _parse_value(name, key, value) for key, value in found.items()}


def _parse_value(name: str, key: str, value: Any) -> MetricValue:
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biuf" and array.ndim <= 1:
            plain: MetricValue = array.astype(np.float64).tolist()
            return plain
        described = f"an array of shape {array.shape}" if array.dtype.kind in "biuf" else f"{value!r}"
    except Exception:  # of whatever object the recipe returned
        described = type(value).__name__
    raise UserError(f"{name}: {key!r} is {described[:80]}; expected a number or a vector of numbers, (k,)")
