"""`hvdtrain.tensorboard`: a recipe's own images, texts and histograms in its run's TensorBoard folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdtrain.recipe.base import Recipe
from hvdtrain.system.other_frameworks import tensorboard_without_tensorflow

_open_writers: dict[Path, Any] = {}  # torch's SummaryWriter by run folder


class RecipeWriter:
    """Has the methods of `torch.utils.tensorboard.SummaryWriter`: `add_image`, `add_text`, `add_figure`, ...

    They write to RUN_DIR/tensorboard on rank 0, next to the run's own scalars, and do nothing on other ranks, in the
    trial of a recipe before its training, and without TensorBoard. Without a `global_step` the step is `now.step`.
    A `with` block flushes at its end; the run closes what is open.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # what copy and pickle look for
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def call_writer(*args: Any, **kwargs: Any) -> Any:
            step = self._recipe.now.step  # on all ranks: before training there is none
            writer = find_writer(self._recipe)
            if writer is None:
                return None
            method = getattr(writer, name)
            parameters = inspect.signature(method)
            if "global_step" in parameters.parameters:
                given = parameters.bind(*args, **kwargs).arguments
                if given.get("global_step") is None:
                    kwargs["global_step"] = step
            return method(*args, **kwargs)

        return call_writer

    def __enter__(self) -> RecipeWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def tensorboard(recipe: Recipe) -> RecipeWriter:
    """Return a writer to the TensorBoard folder of the run that a recipe is in: `hvdtrain.tensorboard(self)`."""
    return RecipeWriter(recipe)


def find_writer(recipe: Recipe) -> Any:
    """Return the SummaryWriter of a recipe's run, opened by the first call; None if nothing is to be written."""
    now = recipe.now
    if now.rank != 0 or now.is_trial:
        return None
    if now.folder not in _open_writers:
        folder = str(now.folder / "tensorboard")
        with tensorboard_without_tensorflow():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:  # the run's own logger reports it
                return None
            _open_writers[now.folder] = SummaryWriter(folder, filename_suffix=".recipe")
    return _open_writers[now.folder]


def close_writers() -> None:
    """Write what is left, and close the files; a later call of a writer opens a new one."""
    while _open_writers:
        _open_writers.popitem()[1].close()
