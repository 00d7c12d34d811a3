"""The recipe's `logged`, which gets each row of metrics.jsonl on rank 0."""

from __future__ import annotations

import json
from collections.abc import Callable

from hvdtrain.recipe.base import Recipe, is_overridden
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.training.rows import MetricsRow


class RowHook:
    """Gives rows to the recipe's `logged`, until that raises: a run does not end because of it."""

    def __init__(self, recipe: Recipe, warn: Callable[[str], None]) -> None:
        """Call the `logged` of a recipe. warn: prints a line when it has raised."""
        self.recipe, self._warn = recipe, warn
        self._is_on = is_overridden(recipe, "logged")

    def log_row(self, row: MetricsRow) -> None:
        """Call `logged` with the row as it is written."""
        if not self._is_on:
            return
        try:
            with in_recipe(self.recipe, "logged()"):
                self.recipe.logged(json.loads(row.encode()))
        except Exception as error:
            self._is_on = False
            self._warn(f"{error}; it is not called any more")
