"""What a recipe remembers besides its model: `Recipe.state`, saved, sent to other ranks, put back after a lost step.

A step or a hook that was not finished, as a rank was lost, comes again in the next world; what it has done is undone:

    start_step, evaluated_model     snapshot()      in an elastic run
    the step is made, or saved      forget_snapshot()
    switch_world                    restore_snapshot()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hvdtrain.recipe.base import StateValues, is_overridden
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.readable import iterate_leaves
from hvdtrain.torch.recipe import Recipe


class RecipeState:
    """Saves and loads what a recipe remembers, if it has `state` and `load_state`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.exists = recipe, is_overridden(recipe, "state")
        self.keeps_snapshots = False  # the world may change
        self._snapshot: StateValues | None = None

    def collect_values(self) -> StateValues:
        """Return what the recipe's `state` does, with tensors copied to the CPU.

        Raises:
            RecipeError: for what it raises.
            UserError: names the first value that is neither of JSON nor a tensor.
        """
        call = name_call(self.recipe, "state()")
        with in_recipe(self.recipe, "state()"):
            values = self.recipe.state()
        if not isinstance(values, dict):
            raise UserError(f"{call} returned {type(values).__name__}; expected a dict of JSON values and tensors")
        for path, value in iterate_leaves(values, ""):
            if path.endswith(".keys()") and not isinstance(value, str):
                raise UserError(f"{call} has the key {value!r}, {type(value).__name__}; expected strings as keys")
            if value is not None and not isinstance(value, (bool, int, float, str, Tensor)):
                kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
                raise UserError(f"{call}{path} is a {kind}; expected JSON values and tensors")
        return copy_values(values)  # type: ignore[no-any-return]

    def load_values(self, values: StateValues | None) -> str | None:
        """Give values to the recipe's `load_state`; return a line to print if it is not called although it could be.

        Args:
            values: of a checkpoint or another rank; None: it has none.

        Raises:
            UserError: the recipe has no such method.
        """
        name = type(self.recipe).__name__
        if values is None:
            line = f"state     the checkpoint has none of {name}.state(): it begins as in a new run"
            return line if self.exists else None
        if not self.exists:
            raise UserError(f"the checkpoint has a state of the recipe, and {name} has no load_state(self, state)")
        with in_recipe(self.recipe, "load_state()"):
            self.recipe.load_state(copy_values(values))
        return None

    def snapshot(self) -> None:
        """Remember the state as it is, if it may have to be put back."""
        self._snapshot = self.collect_values() if self.keeps_snapshots and self.exists else None

    def forget_snapshot(self) -> None:
        """Keep what has changed since the snapshot."""
        self._snapshot = None

    def restore_snapshot(self) -> None:
        """Put back the state as it was at the snapshot, if there is one that was not forgotten."""
        if self._snapshot is not None:
            self.load_values(self._snapshot)
        self._snapshot = None


def copy_values(values: Any) -> Any:
    """Return nested values with copies of their tensors, on the CPU, and plain numbers for subclasses of them."""
    if isinstance(values, dict):
        return {str(key): copy_values(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [copy_values(value) for value in values]
    if isinstance(values, Tensor):
        return values.detach().to("cpu", copy=True).contiguous()
    for kind in (bool, int, float, str):
        if isinstance(values, kind):
            return kind(values)
    return values  # None
