"""Metrics as sums and counts: a mean is taken once, of the global sum by the global count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def compute_means(names: Sequence[str], sums: NDArray[np.float64], count: int) -> dict[str, float]:
    """Name each metric's mean over `count` examples. sums: (len(names),) float64."""
    return {name: float(total) / count for name, total in zip(names, sums, strict=True)}
