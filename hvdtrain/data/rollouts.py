"""Experience that is made as training goes, by the model as it is then: reinforcement learning, self-play."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdtrain.recipe.now import Now
from hvdtrain.system.errors import UserError


class Rollouts:
    """A dataset whose examples are played, not read.

        def dataset(self, split):
            return Rollouts(self.play, examples_per_epoch=1000)

        def play(self, now, i):  # example i of step now.step; `self.net` is the model
            ...

    Example i of a step's global batch is play(now, i), whichever rank makes it, with torch's, numpy's and Python's
    global generators seeded by (seed, step, i): the same on any number of ranks, if it depends on nothing else but the
    model. In an evaluation i counts its examples, and the generators are seeded by (seed, i). Examples are made when
    their step begins, in the process that has the model: there are no loader processes (--workers 0).
    """

    def __init__(self, play: Callable[[Now, int], Any], examples_per_epoch: int) -> None:
        """Describe examples to play.

        Args:
            play: returns an example.
            examples_per_epoch: over all ranks; of an evaluation, its number of examples.

        Raises:
            UserError: for an epoch without examples.
        """
        if examples_per_epoch < 1:
            raise UserError(f"Rollouts(..., examples_per_epoch={examples_per_epoch}): expected 1 at least")
        self.play, self.examples_per_epoch = play, examples_per_epoch

    def __len__(self) -> int:
        return self.examples_per_epoch
