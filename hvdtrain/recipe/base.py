"""What a recipe is, for every framework: a dataclass whose fields are its command-line options, and four methods."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import ClassVar, Literal

from hvdtrain.recipe.options import option
from hvdtrain.system.errors import UserError


@dataclass(kw_only=True)
class Recipe:
    """A model, its data, its optimizer and its score.

    A framework's Recipe (`hvdtrain.torch.Recipe`) adds the methods. Subclass that, with `@dataclass(kw_only=True)`;
    a field that is overridden keeps its help text.
    """

    framework: ClassVar[str] = ""
    # The metric of the evaluation by which the best checkpoint is kept.
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")

    epochs: int = option(10, "passes over the training examples", at_least=1, section="Data")
    batch_size: int = option(
        64, "examples per step over all ranks together, on any number of ranks", at_least=1, section="Data"
    )
    lr: float = option(0.1, "learning rate, before the schedule", section="Optimization")
    schedule: str = option(
        "constant",
        "learning-rate schedule, e.g. 'warmup:5ep cosine', 'step:30ep,60ep x0.1', 'linear', 'constant'",
        section="Optimization",
    )


def check_methods(cls: type[Recipe]) -> None:
    """Raise UserError if a recipe lacks a method that its framework's Recipe declares abstract."""
    for name in dir(cls):
        method = inspect.getattr_static(cls, name, None)  # getattr would give a class without fields `__annotations__`
        if getattr(method, "__isabstractmethod__", False):
            arguments = ", ".join(inspect.signature(method).parameters)
            raise UserError(f"{cls.__name__} has no method {name}({arguments}), which a recipe needs: define it")
