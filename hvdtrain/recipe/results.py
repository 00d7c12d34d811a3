"""What a step, a round of local steps and the exchange of gradients have come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvdtrain.recipe.votes import StepVotes


@dataclass(frozen=True)
class StepResult:
    """What a rank knows after an exchange. It is the same on all ranks but for what says "here"."""

    score_sums: NDArray[np.float64]  # (layout.num_sums,) over the global batch
    votes: StepVotes  # of all ranks, summed
    nonfinite_loss: bool  # a loss of some rank was not finite
    nonfinite_gradients: tuple[str, ...]  # parameters whose gradient, summed over ranks, is not finite
    nonfinite_loss_here: bool
    waited_here: float  # seconds that this rank waited for communication
    zero_denominator: bool = False  # the loss's own denominators add up to 0: there is nothing to learn from

    @property
    def is_nonfinite(self) -> bool:
        """Whether losses or gradients are not finite."""
        return self.nonfinite_loss or bool(self.nonfinite_gradients)

    @property
    def must_skip(self) -> bool:
        """Whether the update must be skipped."""
        return self.is_nonfinite or self.zero_denominator


@dataclass(frozen=True)
class RoundResult:
    """What the end of a round of local steps has come to; the same on all ranks but for the seconds."""

    steps: int  # that were not skipped
    waited_here: float  # seconds that this rank waited for communication
    nonfinite: tuple[str, ...]  # of each update that a rank left out, which gradient was not finite, and where


@dataclass(frozen=True)
class ExchangeReport:
    """How gradients travel, for summary.json and advisor.json; and how many do not."""

    buckets: Sequence[Mapping[str, object]]  # of each: values, compression, bytes_sent, ...
    advice: Mapping[str, object] | None  # what `--compression auto` measured and chose
    sparsity: float | None = None  # with --prune: the share of the weights that are pruned
