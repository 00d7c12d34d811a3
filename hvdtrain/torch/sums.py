"""The small numbers of a step, summed over ranks in one collective that travels while backward computes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.recipe.framework import NUM_VOTES, StepResult, StepVotes
from hvdtrain.recipe.metrics import ScoreLayout
from hvdtrain.torch.scores import Scores, get_numerators, sum_scores


@dataclass(frozen=True)
class StepTotals:
    """The sums over all ranks."""

    scores: NDArray[np.float64]  # (layout.num_sums,)
    votes: StepVotes
    change_flags: list[float]  # ranks on which each thing has changed
    nonfinite_ranks: int  # ranks on which a loss, or a denominator of it, was not finite
    negative_ranks: int  # ranks on which a denominator of the loss was negative
    gradient_factor: float  # from the sum of losses / examples to the loss: examples / own denominators; 0: these are 0

    def make_result(self, nonfinite_gradients: tuple[str, ...], nonfinite_here: bool, waited: float) -> StepResult:
        """Return what this rank knows of the step. nonfinite_here: of a loss. waited: seconds."""
        return StepResult(
            score_sums=self.scores,
            votes=self.votes,
            nonfinite_loss=self.nonfinite_ranks > 0,
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_loss_here=self.nonfinite_ranks > 0 and nonfinite_here,
            waited_here=waited,
            zero_denominator=self.gradient_factor == 0,
        )


class StepSums:
    """A float64 vector on the device:

    sums of the scores (layout.num_sums,) | votes (NUM_VOTES,) | change flags (num_flags,) | a loss is not finite (1,) |
    a denominator of the loss is negative (1,) | in a deterministic run, sums of these denominators (num_shards,)

    The last are added up in an order that does not depend on the ranks: gradients are divided by their sum.
    """

    def __init__(self, layout: ScoreLayout, num_flags: int, num_shards: int | None, device: torch.device) -> None:
        """Make the vector.

        Args:
            layout: of the scores.
            num_flags: how many change flags there are (hvdtrain.torch.changes).
            num_shards: virtual shards of a deterministic run; None for another run.
            device: what the scores are computed on.
        """
        self.layout, self.num_flags = layout, num_flags
        self.num_shards = num_shards if num_shards and layout.loss_has_denominators else 0
        self._first_flag = layout.num_sums + NUM_VOTES + num_flags  # of the two
        self.vector = torch.zeros(self._first_flag + 2 + self.num_shards, dtype=torch.float64, device=device)
        self.nonfinite_here = torch.zeros((), dtype=torch.bool, device=device)
        self._negative_here = torch.zeros((), dtype=torch.bool, device=device)
        # Pinned: a GPU takes them from there without waiting.
        self._own_numbers = torch.zeros(NUM_VOTES + num_flags, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._handle: collectives.Handle | None = None
        self._shard_of_pass: Iterator[int] = iter(())

    @property
    def num_bytes(self) -> int:
        return self.vector.numel() * self.vector.element_size()

    def start_step(self, passes: Sequence[int], first_shard: int) -> None:
        """Start with sums of zero. passes: the micro-batches of each of this rank's shards, from `first_shard` on."""
        self.vector.zero_()
        self.nonfinite_here.zero_()
        self._negative_here.zero_()
        if self.num_shards:
            self._shard_of_pass = iter([first_shard + i for i, count in enumerate(passes) for _ in range(count)])

    def add_scores(self, scores: Scores) -> None:
        """Add the sums of a micro-batch's scores; note whether its (B,) losses are finite."""
        sums = sum_scores(scores, self.layout)
        self.vector[: self.layout.num_sums] += sums
        self.nonfinite_here |= ~torch.isfinite(get_numerators(scores["loss"]).detach()).all()
        if self.layout.loss_has_denominators:
            denominators = scores["loss"][1].detach()
            self.nonfinite_here |= ~torch.isfinite(denominators).all()
            self._negative_here |= (denominators < 0).any()
            if self.num_shards:
                place = self._first_flag + 2 + next(self._shard_of_pass)
                self.vector[place] += sums[self.layout.num_numerators]

    def start_all_reduce(self, votes: StepVotes, change_flags: Sequence[float], num_ranks: int) -> None:
        """Add this rank's votes and flags, and start the sum over ranks."""
        self._own_numbers.copy_(torch.tensor([*votes.to_vector(), *change_flags], dtype=torch.float64))
        self.vector[self.layout.num_sums : self._first_flag].copy_(self._own_numbers, non_blocking=True)
        self.vector[self._first_flag] = self.nonfinite_here
        if self.layout.loss_has_denominators:
            self.vector[self._first_flag + 1] = self._negative_here
        if num_ranks > 1:
            self._handle = collectives.all_reduce_async_(self.vector, "step.sums")

    def wait(self) -> float:
        """Wait for the sum over ranks; return the seconds that it took."""
        if self._handle is None:
            return 0.0
        begin = time.perf_counter()
        collectives.wait(self._handle)
        self._handle = None
        return time.perf_counter() - begin

    def read_totals(self) -> StepTotals:
        """Return the sums, once they were waited for."""
        numbers = self.vector.cpu().numpy().copy()
        first_vote, first_flag = self.layout.num_sums, self._first_flag
        scores, votes, flags, marks, shards = np.split(
            numbers, [first_vote, first_vote + NUM_VOTES, first_flag, first_flag + 2]
        )
        if self.num_shards:
            scores[self.layout.num_numerators] = math.fsum(shards)
        totals, factor = StepVotes.from_vector(votes), 1.0
        if self.layout.loss_has_denominators:
            denominator = self.layout.loss_denominator(scores, totals.examples)
            factor = totals.examples / denominator if denominator else 0.0
        return StepTotals(scores, totals, flags.tolist(), int(marks[0]), int(marks[1]), factor)

    def forget_all_reduce(self) -> None:
        """Do not wait for a sum over ranks that was started in a world that was left."""
        self._handle = None
