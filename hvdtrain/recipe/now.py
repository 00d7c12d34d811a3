"""What a recipe knows of the training that it is in: `recipe.now`, kept by the loop.

model, dataset, optimizer          folder, rank and size only: the plan is made of what they return
the trial before the first step    as in the first step of a new run
sampler, as a run begins           all but `steps` and `epochs`, which depend on what it returns
each training step                 the updates finished before it: 0 in the first one
evaluations, and the hooks after   the updates finished, `training` False
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdtrain.recipe.step_options import DataOptions


@dataclass(frozen=True, kw_only=True)
class Now:
    """Where a training is. It is the same on all ranks but for `rank`.

    Attributes:
        folder: the run folder, absolute. It exists once the training has begun; rank 0 writes to it.
        rank: of this process, from 0.
        size: the number of ranks.
        step: updates finished since the run began, also before a resume; those that were skipped count.
        steps: at which the run ends.
        epoch: epochs finished: 0 in the first one.
        epochs: the number of epochs.
        samples: training examples consumed since the run began.
        training: False in evaluations.
    """

    folder: Path
    rank: int
    size: int
    step: int
    steps: int
    epoch: int
    epochs: int
    samples: int
    training: bool

    is_trial = False  # a trial before the first step, of which nothing remains

    @staticmethod
    def before_training(folder: Path, rank: int, size: int) -> Now:
        """Return what is known before there is a plan; the other attributes raise AttributeError, by their names."""
        now = object.__new__(Now)
        vars(now).update(folder=folder, rank=rank, size=size)
        return now

    def before_plan(self, step: int, epoch: int, samples: int) -> Now:
        """Return what is known when a run begins, before its sampler has given an order: no `steps`, `epochs`."""
        now = Now.before_training(self.folder, self.rank, self.size)
        vars(now).update(step=step, epoch=epoch, samples=samples, training=True)
        return now

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # called for what is not set
            if name in {field.name for field in fields(Now)}:
                raise AttributeError(f"now.{name} is not known before training")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Now({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass(frozen=True, kw_only=True, repr=False)
class TrialNow(Now):
    """What a recipe knows in a trial: the same as in the step that the trial is like."""

    is_trial = True


def set_now(recipe: object, now: Now) -> None:
    """Set a recipe's `now`."""
    vars(recipe)["now"] = now  # `Recipe.now` is a property without a setter, which comes before it


@contextlib.contextmanager
def temporary_now(recipe: object, now: Now) -> Iterator[None]:
    """Set a recipe's `now` within a block."""
    before = vars(recipe).get("now")
    set_now(recipe, now)
    try:
        yield
    finally:
        vars(recipe).pop("now")
        vars(recipe).update({} if before is None else {"now": before})


def foresee_first_step(recipe: Any, options: DataOptions, examples: int) -> TrialNow:
    """Return what holds in the first step of a new run: for the trial of a recipe before its training.

    Args:
        recipe: whose `now` is as before training, or not set: outside of a run.
        options: of the run.
        examples: training examples.
    """
    now = vars(recipe).get("now") or Now.before_training(Path.cwd(), rank=0, size=1)
    batch_size = options.batch_per_rank * now.size if options.batch_per_rank else recipe.batch_size
    steps_per_epoch = max(1, -(-examples // batch_size))
    return TrialNow(
        folder=now.folder,
        rank=now.rank,
        size=now.size,
        step=0,
        steps=options.steps or recipe.epochs * steps_per_epoch,
        epoch=0,
        epochs=-(-options.steps // steps_per_epoch) if options.steps else recipe.epochs,
        samples=0,
        training=True,
    )
