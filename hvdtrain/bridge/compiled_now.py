"""What a recipe knows of a training in methods that are compiled once for many steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hvdtrain.recipe.now import Now, temporary_now


@dataclass(frozen=True, kw_only=True, repr=False)
class CompiledNow(Now):
    """What a recipe knows of a training while its `score` is compiled, once for many steps."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"now.{name} in score would be the same in all steps, as score is compiled once: expected what depends on "
            "the step in the batch (dataset, collate), or as an array in a collection of the model"
        )


@contextlib.contextmanager
def compiled_now(recipe: Any, *, training: bool) -> Iterator[None]:
    """Let a recipe's `now` have, within a block, what is the same in all steps."""
    now = vars(recipe).get("now")
    if now is None:
        yield
        return
    fixed = object.__new__(CompiledNow)
    vars(fixed).update(folder=now.folder, rank=now.rank, size=now.size, training=training)
    with temporary_now(recipe, fixed):
        yield
