"""Which scores a training step has: with several optimizers `score` may leave some out, on all ranks alike.

score of each pass    names are counted;   their counts travel with the sums of the scores
before the last backward pass, on a rank without examples before the exchange:
each name was returned by all passes of all ranks, or by none, or the step is refused
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hvdtrain.comm import collectives
from hvdtrain.recipe.metrics import ScoreLayout
from hvdtrain.system.errors import UserError


class ScoreSelection:
    """Counts the passes of a step that have returned each score.

    Attributes:
        num_counts: how many numbers `counts` are; 0 unless scores may be left out.
    """

    def __init__(self, recipe: str, layout: ScoreLayout) -> None:
        self.recipe_name, self.layout = recipe, layout
        self.num_counts = len(layout.names) + 1 if layout.several else 0
        self.start_step()

    def start_step(self) -> None:
        """Begin to count."""
        self._passes = 0
        self._returned = dict.fromkeys(self.layout.names, 0)

    def add_pass(self, names: Iterable[str]) -> None:
        """Count a pass that has returned these scores."""
        self._passes += 1
        for name in names:
            self._returned[name] += 1

    @property
    def counts(self) -> list[float]:
        """This rank's passes with each score, and all its passes: to be summed over ranks."""
        return [*map(float, self._returned.values()), float(self._passes)] if self.num_counts else []

    def agree(self, totals: Sequence[float]) -> tuple[str, ...]:
        """Return the losses that the step has. All ranks call it.

        totals: `counts`, summed over ranks.

        Raises:
            UserError: on all ranks, if not all passes have returned the same scores, or none of them a loss.
        """
        if not self.num_counts:
            return self.layout.losses
        passes = dict(zip(self.layout.names, totals[:-1], strict=True))
        if uneven := [name for name, count in passes.items() if 0 < count < totals[-1]]:
            own = [f"{count} of {self._passes}" for name, count in self._returned.items() if name == uneven[0]]
            by_rank = collectives.gather_json(own[0] if self._passes else None, "selection.uneven")
            where = ", ".join(f"{text} on rank {rank}" for rank, text in enumerate(by_rank) if text)
            raise UserError(
                f"{self.recipe_name}.score has returned {uneven[0]!r} in a part of the step's passes only ({where}): "
                "what it leaves out may depend on self.now (not on its rank), and not on the examples"
            )
        losses = tuple(name for name in self.layout.losses if passes[name])
        if not losses:
            raise UserError(
                f"{self.recipe_name}.score has returned none of {', '.join(self.layout.losses)} in a training step: "
                "there is nothing to train; return one at least"
            )
        return losses
