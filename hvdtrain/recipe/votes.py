"""What every rank contributes to a step besides gradients, in one sum over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepVotes:
    """What every rank contributes to a step besides gradients; summed over ranks together with the scores."""

    stop: int = 0  # ranks asked to stop the run
    leave: int = 0  # ranks asked to leave it, as they will be preempted
    regroup: int = 0  # ranks whose supervisor has newcomers ready
    examples: int = 0  # example ids fed to the model
    id_hashes: int = 0  # sum of their 32-bit hashes
    ledger_durable: int = 0  # rank 0 only: the last step whose ledger row is on disk for good
    lr_hashes: int = 0  # sum of 32-bit hashes of what `lr_factor` has returned
    compares_speeds: int = 0  # rank 0 only: 1 if the ranks are to compare their speeds after this step
    pending_rows: int = 0  # rank 0 only: rows of metrics.jsonl that wait for disk space

    def to_vector(self) -> NDArray[np.float64]:
        """Return (NUM_VOTES,) float64, to be summed over ranks: exact up to 2^53."""
        return np.fromiter(vars(self).values(), np.float64)

    @staticmethod
    def from_vector(vector: NDArray[np.float64]) -> StepVotes:
        """Return the votes that (NUM_VOTES,) float64, a sum over ranks, stands for."""
        return StepVotes(*map(int, vector))


NUM_VOTES = len(StepVotes().to_vector())
