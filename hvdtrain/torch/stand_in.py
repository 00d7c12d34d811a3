"""What a recipe's `score` is given in place of a model that is in stages, none of which the rank has whole.

On the first stage it takes note of what the model is given, and `score` ends there; on the last stage it returns what
the stage has computed, and `score` goes on. What `score` does before it calls the model is done on both, with the same
random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from hvdtrain.system.errors import UserError
from hvdtrain.torch.recipe import Recipe


class InputsNoted(BaseException):
    """Ends `score` once it has called the model; no `except Exception` of a recipe catches it."""


class StandIn:
    """What `score` is given as the model.

    Attributes:
        calls: how often it was called.
    """

    def __init__(
        self, recipe: Recipe, respond: Callable[[tuple[Any, ...]], Any], training: bool = True, method: str = "score"
    ) -> None:
        """Stand in for a model.

        Args:
            recipe: for messages.
            respond: returns what the model returns for its arguments.
            training: its mode.
            method: of the recipe, which is given it; `score` calls it once.
        """
        self._method, self._respond = f"{type(recipe).__name__}.{method}", respond
        self._is_called_once = method == "score"
        self.calls, self.training = 0, training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns. Raises UserError for what stages cannot be given."""
        self.calls += 1
        if self.calls > 1 and self._is_called_once:
            raise UserError(
                f"--stages: {self._method} calls the model a second time; a pass of a pipeline is one call, model(...)"
            )
        if kwargs:
            raise UserError(
                f"--stages: {self._method} calls the model with {', '.join(kwargs)} by keyword; pass what it takes by "
                "position"
            )
        for number, x in enumerate(args):
            if not isinstance(x, Tensor):
                raise UserError(
                    f"--stages: {self._method} gives the model a {type(x).__name__} as argument {number}; expected "
                    "tensors (B, ...)"
                )
        return self._respond(args)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python asks of any object
            raise AttributeError(name)
        raise UserError(
            f"--stages: {self._method} uses model.{name}, and each rank has a part of the model only: call the model, "
            "and compute what is asked for from what it returns"
        )


def note_inputs(recipe: Recipe, batch: Any, training: bool = True) -> tuple[Tensor, ...]:
    """Return what `score` gives to the model for a batch. Raises UserError if it does not call it."""
    found: list[tuple[Tensor, ...]] = []

    def note(args: tuple[Tensor, ...]) -> NoReturn:
        found.append(args)
        raise InputsNoted

    try:
        recipe.score(StandIn(recipe, note, training), batch)  # type: ignore[arg-type]
    except InputsNoted:
        return found[0]
    raise UserError(f"--stages: {type(recipe).__name__}.score does not call the model; nothing passes the stages")
