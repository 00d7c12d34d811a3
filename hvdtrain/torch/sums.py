"""The small numbers of a step, summed over ranks in one collective that travels while backward computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.recipe.framework import NUM_VOTES, StepVotes


@dataclass(frozen=True)
class StepTotals:
    """The sums over all ranks."""

    scores: NDArray[np.float64]  # (num_scores,)
    votes: StepVotes
    change_flags: list[float]  # ranks on which each thing has changed
    nonfinite_ranks: int  # ranks on which a loss was not finite


class StepSums:
    """A float64 vector on the device:

    sums of the scores (num_scores,) | votes (NUM_VOTES,) | change flags (num_flags,) | a loss is not finite (1,)
    """

    def __init__(self, num_scores: int, num_flags: int, device: torch.device) -> None:
        """Make the vector.

        num_scores: numbers that the scores are summed in. num_flags: change flags (hvdtrain.torch.changes).
        """
        self.num_scores = num_scores
        self.vector = torch.zeros(num_scores + NUM_VOTES + num_flags + 1, dtype=torch.float64, device=device)
        self.nonfinite_here = torch.zeros((), dtype=torch.bool, device=device)
        # Pinned: a GPU takes them from there without waiting.
        self._own_numbers = torch.zeros(NUM_VOTES + num_flags, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._handle: collectives.Handle | None = None

    @property
    def num_bytes(self) -> int:
        return self.vector.numel() * self.vector.element_size()

    def clear(self) -> None:
        """Start with sums of zero."""
        self.vector.zero_()
        self.nonfinite_here.zero_()

    def add_scores(self, sums: Tensor, loss: Tensor) -> None:
        """Add (num_scores,) float64 sums of a micro-batch's scores; note whether its (B,) losses are finite."""
        self.vector[: self.num_scores] += sums
        self.nonfinite_here |= ~torch.isfinite(loss).all()

    def start_all_reduce(self, votes: StepVotes, change_flags: Sequence[float], num_ranks: int) -> None:
        """Add this rank's votes and flags, and start the sum over ranks."""
        self._own_numbers.copy_(torch.tensor([*votes.to_vector(), *change_flags], dtype=torch.float64))
        self.vector[self.num_scores : -1].copy_(self._own_numbers, non_blocking=True)
        self.vector[-1] = self.nonfinite_here
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
        numbers = self.vector.cpu().numpy()
        scores, votes, flags = np.split(numbers[:-1].copy(), [self.num_scores, self.num_scores + NUM_VOTES])
        return StepTotals(scores, StepVotes.from_vector(votes), flags.tolist(), int(numbers[-1]))

    def forget_all_reduce(self) -> None:
        """Do not wait for a sum over ranks that was started in a world that was left."""
        self._handle = None
