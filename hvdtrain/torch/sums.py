"""The small numbers of a step, summed over ranks in one collective that travels while backward computes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.exchange.options import ExchangeOptions
from hvdtrain.recipe.framework import NUM_VOTES, StepResult, StepVotes
from hvdtrain.recipe.metrics import ScoreLayout
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.scores import Scores, get_numerators, negative_denominators, sum_scores
from hvdtrain.torch.selection import ScoreSelection


@dataclass(frozen=True)
class StepTotals:
    """The sums over all ranks."""

    scores: NDArray[np.float64]  # (layout.num_sums,)
    votes: StepVotes
    change_flags: list[float]  # ranks on which each thing has changed
    losses: tuple[str, ...]  # that the step has
    # Of losses with denominators of their own: what makes gradients of the sum of losses / examples those of the loss;
    # 0 if these denominators add up to 0.
    gradient_factors: Mapping[str, float]
    own_factors: Mapping[str, float]  # the same, in a local step of this rank's gradients
    own_examples: int  # that this rank fed to the model
    nonfinite_ranks: int  # ranks on which a loss, or a denominator of it, was not finite

    def make_result(self, nonfinite_gradients: tuple[str, ...], nonfinite_here: bool, waited: float) -> StepResult:
        """Return what this rank knows of the step. nonfinite_here: of a loss. waited: seconds."""
        return StepResult(
            score_sums=self.scores,
            votes=self.votes,
            nonfinite_loss=self.nonfinite_ranks > 0,
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_loss_here=self.nonfinite_ranks > 0 and nonfinite_here,
            waited_here=waited,
            zero_denominator=all(self.gradient_factors.get(name) == 0 for name in self.losses),
        )


class StepSums:
    """A float64 vector on the device:

    sums of the scores (layout.num_sums,) | votes (NUM_VOTES,) | change flags (num_flags,) | with several losses, how
    many passes have each score (selection.num_counts,) | a loss is not finite (1,) | a denominator of a loss is
    negative (1,) | in a deterministic run, sums of each loss's denominators (num_shards,)

    The last are added up in an order that does not depend on the ranks: gradients are divided by their sum.
    """

    def __init__(
        self, recipe: Recipe, layout: ScoreLayout, num_flags: int, options: ExchangeOptions, device: torch.device
    ) -> None:
        """Make the vector.

        Args:
            recipe: whose `score` it is.
            layout: of the scores.
            num_flags: how many change flags there are (hvdtrain.torch.changes).
            options: the virtual shards of a deterministic run.
            device: what the scores are computed on.
        """
        self.recipe, self.layout, self.selection = recipe, layout, ScoreSelection(type(recipe).__name__, layout)
        self._first_count = layout.num_sums + NUM_VOTES + num_flags  # of the selection
        self.num_shards = (options.num_shards or 0) if layout.loss_denominators else 0
        self._first_flag = self._first_count + self.selection.num_counts  # of the two
        count = self._first_flag + 2 + self.num_shards * len(layout.loss_denominators)
        self.vector = torch.zeros(count, dtype=torch.float64, device=device)
        self.nonfinite_here = torch.zeros((), dtype=torch.bool, device=device)
        self._negative_here = torch.zeros((), dtype=torch.bool, device=device)
        # Pinned: a GPU takes them from there without waiting.
        self._own_numbers = torch.zeros(
            self._first_flag - layout.num_sums, dtype=torch.float64, pin_memory=device.type == "cuda"
        )
        self._handle: collectives.Handle | None = None
        self._is_local = False  # the step
        self._own_scores: torch.Tensor | None = None  # (layout.num_sums,) of a local step, before the sum over ranks
        self._own_examples = 0
        self._shard_of_pass: Iterator[int] = iter(())

    @property
    def num_bytes(self) -> int:
        return self.vector.numel() * self.vector.element_size()

    def start_step(self, passes: Sequence[int], first_shard: int, is_local: bool) -> None:
        """Start with sums of zero.

        Args:
            passes: the micro-batches of each of this rank's shards, from `first_shard` on.
            first_shard: the number of the first one.
            is_local: whether gradients stay on their rank.
        """
        self.vector.zero_()
        self.nonfinite_here.zero_()
        self._negative_here.zero_()
        self.selection.start_step()
        self._is_local, self._own_scores = is_local, None
        if self.num_shards:
            self._shard_of_pass = iter([first_shard + i for i, count in enumerate(passes) for _ in range(count)])

    def add_scores(self, scores: Scores) -> None:
        """Add the sums of a micro-batch's scores; note whether its (B,) losses are finite."""
        self.selection.add_pass(scores)
        sums = sum_scores(scores, self.layout)
        self.vector[: self.layout.num_sums] += sums
        for name in (name for name in self.layout.losses if name in scores):
            self.nonfinite_here |= ~torch.isfinite(get_numerators(scores[name]).detach()).all()
        shard = next(self._shard_of_pass) if self.num_shards else 0
        for number, (name, place) in enumerate(self.layout.loss_denominators.items()):
            if name in scores:
                denominators = scores[name][1].detach()
                self.nonfinite_here |= ~torch.isfinite(denominators).all()
                self._negative_here |= (denominators < 0).any()
                if self.num_shards:
                    self.vector[self._first_flag + 2 + number * self.num_shards + shard] += sums[place]

    def start_all_reduce(
        self, votes: StepVotes, change_flags: Sequence[float], num_ranks: int, counts_examples: bool
    ) -> None:
        """Add this rank's votes and flags, and start the sum over ranks. counts_examples: whether its scores count."""
        self._own_examples = votes.examples
        if not counts_examples:
            self.vector[: self.layout.num_sums] = 0
        if self._is_local and self.layout.loss_denominators:
            self._own_scores = self.vector[: self.layout.num_sums].clone()
        self._own_numbers.copy_(
            torch.tensor([*votes.to_vector(), *change_flags, *self.selection.counts], dtype=torch.float64)
        )
        self.vector[self.layout.num_sums : self._first_flag].copy_(self._own_numbers, non_blocking=True)
        self.vector[self._first_flag] = self.nonfinite_here
        if self.layout.loss_denominators:
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
        """Return the sums, once they were waited for.

        Raises UserError on all ranks for losses that only some of them have, or a negative denominator.
        """
        numbers = self.vector.cpu().numpy().copy()
        first_vote, first_count, first_flag = self.layout.num_sums, self._first_count, self._first_flag
        scores, own_votes, flags, counts, marks, shards = np.split(
            numbers, [first_vote, first_vote + NUM_VOTES, first_count, first_flag, first_flag + 2]
        )
        if self.num_shards:
            for number, place in enumerate(self.layout.loss_denominators.values()):
                scores[place] = math.fsum(shards[number * self.num_shards : (number + 1) * self.num_shards])
        if marks[1]:
            raise negative_denominators(self.recipe, self.layout)
        losses, votes = self.selection.agree(counts.tolist()), StepVotes.from_vector(own_votes)
        factors = {name: f for name, f in self.layout.loss_factors(scores, votes.examples).items() if name in losses}
        own_factors = factors
        if self._own_scores is not None:
            own_factors = self.layout.loss_factors(self._own_scores.cpu().numpy(), self._own_examples)
        return StepTotals(
            scores, votes, flags.tolist(), losses, factors, own_factors, self._own_examples, int(marks[0])
        )

    def forget_all_reduce(self) -> None:
        """Do not wait for a sum over ranks that was started in a world that was left."""
        self._handle = None
