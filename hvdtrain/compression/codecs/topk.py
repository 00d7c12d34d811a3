"""The largest values and their indices (Aji and Heafield, 1704.05021; DGC, 1712.01887)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.arguments import Fraction
from hvdtrain.compression.codec import Codec, Collective, RandomKey, decode_by_adding
from hvdtrain.compression.registry import compressor

SAMPLE_STRIDE = 64  # the threshold is found among one in 64 values


@compressor(
    "topk",
    argument=Fraction("fraction of the values that is sent", default=0.01),
    dense_steps=100,
    auto_candidate=True,
    takes_momentum=True,
)
@dataclass(frozen=True)
class TopK(Codec):
    """Send the fraction `ratio` of the values with the largest magnitude: float32, with 16- or 32-bit indices."""

    ratio: float = 0.01

    collective = Collective.ALL_GATHER

    def count_sent(self, n: int) -> int:
        """Return how many of n values are sent."""
        return max(1, math.ceil(self.ratio * n))

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(n,) -> (k (4 + 2) or k (4 + 4),) uint8"""
        indices = largest_indices(x, self.count_sent(len(x)))
        stored = indices.to(torch.int16 if len(x) <= 2**15 else torch.int32)
        return torch.cat([x[indices].float().view(torch.uint8), stored.view(torch.uint8)])

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return decode_by_adding(self, payload, n, key)

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        if fresh:
            total.zero_()
        k = self.count_sent(len(total))
        values = payload[: 4 * k].clone().view(torch.float32)
        indices = payload[4 * k :].clone().view(torch.int16 if len(total) <= 2**15 else torch.int32)
        total.index_add_(0, indices.int(), values, alpha=alpha)


def largest_indices(x: Tensor, k: int) -> Tensor:
    """Return the indices of the k values of x with the largest magnitude: (k,) int64. NaN counts as largest.

    A threshold from a sample leaves few candidates, and the true k are among them if at least k pass it; sorting out
    all of x, as torch.topk does, takes several times as long.
    """
    magnitude = x.abs()
    if len(x) >= 2**16 and k * 4 <= len(x):
        sample = magnitude[::SAMPLE_STRIDE]
        # Somewhat more candidates than k, so that it is seldom too few.
        threshold = sample.topk(min(len(sample), int(1.5 * k / SAMPLE_STRIDE) + 16)).values[-1]
        candidates = (~(magnitude < threshold)).nonzero().squeeze(1)
        if k <= len(candidates) < len(x):
            return candidates[magnitude[candidates].topk(k).indices]
    return magnitude.topk(k).indices
