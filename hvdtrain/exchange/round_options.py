"""The run options of rounds: steps in which gradients stay on their rank, and what ends them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvdtrain.recipe.options import option
from hvdtrain.recipe.schedule import parse_run_position


@dataclass(frozen=True)
class OuterStep:
    """How a round ends: a step of SGD with Nesterov momentum whose gradient is minus the mean change.

    v = momentum * v + g;  weights = those at the round's start - lr * (g + momentum * v). With lr 1 and momentum 0 they
    are the mean over ranks.
    """

    lr: float = 1.0
    momentum: float = 0.0

    @property
    def is_average(self) -> bool:
        """Whether the new weights are the mean of the ranks' weights."""
        return self == OuterStep()


@dataclass(kw_only=True)
class RoundOptions:
    """Local SGD (Lin et al., 1808.07217) and DiLoCo (Douillard et al., 2311.08105)."""

    local_steps: int | None = option(
        None,
        "local SGD: each rank makes this many steps of its own, then only what they changed is exchanged; the number "
        "of ranks is then part of the maths",
        at_least=1,
    )
    local_after: str = option(
        "0%", "with --local-steps: gradients are exchanged in each step before this: 25% of the run, 2ep, or 100st"
    )
    outer: str = option(
        "average", "with --local-steps: a round ends with the mean of the weights, or with nesterov:LR,MOMENTUM"
    )

    def __post_init__(self) -> None:
        parse_outer_step(self.outer)
        parse_run_position("--local-after", self.local_after, 0, 0)
        for flag, value, default in (("--local-after", self.local_after, "0%"), ("--outer", self.outer, "average")):
            if self.local_steps is None and value != default:
                raise ValueError(f"{flag} {value} needs --local-steps, the steps of a round, for example 16")

    @property
    def outer_step(self) -> OuterStep:
        """What ends a round."""
        return parse_outer_step(self.outer)


def parse_outer_step(text: str) -> OuterStep:
    """Parse `average` or `nesterov:LR,MOMENTUM`. Raises ValueError."""
    if text == "average":
        return OuterStep()
    match = re.fullmatch(r"nesterov:(\d*\.?\d+),(\d*\.?\d+)", text)
    if match is None or float(match[1]) <= 0 or not float(match[2]) < 1:
        raise ValueError(
            f"--outer is {text!r}; expected average, or nesterov:LR,MOMENTUM with a rate above 0 and a momentum from 0 "
            "to below 1, for example nesterov:0.7,0.9"
        )
    return OuterStep(float(match[1]), float(match[2]))
