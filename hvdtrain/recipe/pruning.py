"""When weights are pruned: gradual magnitude pruning (Zhu and Gupta, 2017, arXiv:1710.01878).

The share of weights that are zero rises from step t0 to step t1, fast at first:

    s(t) = s_final (1 - (1 - (t - t0) / (t1 - t0))^3)

    --prune 0.8,from:2ep,to:10ep        80 % of the weights, from epoch 2 to epoch 10
    --prune 0.8,from:100,to:500         the same by steps
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.recipe.schedule import parse_position
from hvdtrain.system.errors import UserError

NUM_PRUNINGS = 100  # times between the two steps that weights are chosen, or in each step if there are fewer
EXAMPLE = "expected a share of the weights and two positions, such as 0.8,from:2ep,to:10ep"


@dataclass(frozen=True)
class PruningSchedule:
    """The share of weights that are zero after each step."""

    final: float
    begin: int  # steps until pruning begins
    end: int  # steps until the final share is reached

    def sparsity_after(self, steps: int) -> float:
        """Return the share of the weights that are zero after this many steps."""
        if steps <= self.begin:
            return 0.0
        if steps >= self.end:
            return self.final
        span = self.end - self.begin
        turn = (steps - self.begin) * NUM_PRUNINGS // span
        chosen = min(steps - self.begin, -(-turn * span // NUM_PRUNINGS))  # the last step in which they were chosen
        return self.final * (1 - (1 - chosen / span) ** 3)

    def describe(self, total_steps: int) -> str:
        """Return it as a line of the plan."""
        text = f"{self.final:.4g} of the weights are zero at step {self.end}, the first after step {self.begin}"
        if total_steps < self.end:
            text += f"; {self.sparsity_after(total_steps):.4g} at the end, step {total_steps}"
        return f"prune     {text}"


def parse_pruning(text: str, steps_per_epoch: int | None = None) -> PruningSchedule:
    """Parse "0.8,from:2ep,to:10ep". Raises UserError naming the part that is wrong.

    steps_per_epoch: None: not known yet, and the positions of the result mean nothing.
    """

    def refuse(why: str) -> UserError:
        return UserError(f"--prune {text}: {why}; {EXAMPLE}")

    share, *places = text.split(",")
    try:
        final = float(share)
    except ValueError:
        final = 0.0
    if not 0 < final < 1:
        raise refuse(f"{share!r} is not a share between 0 and 1")
    words = dict(place.split(":", 1) for place in places if ":" in place)
    if not places:
        raise refuse("it says how many weights, and not when")
    if len(places) != 2 or words.keys() != {"from", "to"}:
        raise refuse(f"{','.join(places)!r} are not the positions")
    begin, end = (parse_position(words[name], steps_per_epoch or 1, refuse) for name in ("from", "to"))
    if steps_per_epoch is not None and begin >= end:
        raise refuse(f"from:{words['from']} is not before to:{words['to']}")
    return PruningSchedule(final, begin, end)
