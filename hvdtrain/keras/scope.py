"""Values of Keras variables while a pure function is computed, and what its layers change and add to the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import keras

from hvdtrain.system.errors import UserError

Variable: TypeAlias = Any  # a keras.Variable


class PureScope(keras.StatelessScope):  # type: ignore[misc]  # Keras is untyped
    """A `keras.StatelessScope` that knows of changes of variables whose values it was not given.

    Attributes:
        added_losses: what `add_loss` was called with; a second call of a layer does not take away the first one's.
    """

    def __init__(self, values: Iterable[tuple[Any, Any]]) -> None:
        super().__init__(state_mapping=list(values), collect_losses=True)
        self.added_losses: list[Any] = []
        self._known, self._unknown = set(self.state_mapping), list[Any]()

    def add_loss(self, loss: Any) -> None:
        super().add_loss(loss)
        self.added_losses.append(loss)

    def add_update(self, update: tuple[Any, Any]) -> None:
        super().add_update(update)
        if id(update[0]) not in self._known:
            self._unknown.append(update[0])

    def check_changes(self, caller: str) -> None:
        """Raise UserError if a variable was changed whose value will be forgotten."""
        for variable in self._unknown:
            raise UserError(
                f"{caller} changes the variable {variable.path!r}, which is not of the model and would keep its old "
                "value: make what owns it a layer of the model, or an attribute of the recipe"
            )
