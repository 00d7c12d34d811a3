"""The largest values and their places (Aji and Heafield, 1704.05021; DGC, 1712.01887)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, RandomKey, decode_by_adding

SAMPLE_STRIDE = 64  # the threshold is looked for among one in so many values


@dataclass(frozen=True)
class TopK:
    """The part `ratio` of the values with the largest magnitude, as float32 with 16- or 32-bit places."""

    ratio: float = 0.01
    collective: Collective = "gather"
    feedback: bool = True
    block_size: int = 1

    def count_sent(self, n: int) -> int:
        return max(1, math.ceil(self.ratio * n))

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(n,) -> (k (4 + 2) or k (4 + 4),) uint8"""
        places = largest_indices(x, self.count_sent(len(x)))
        stored = places.to(torch.int16 if len(x) <= 2**15 else torch.int32)
        return torch.cat([x[places].float().view(torch.uint8), stored.view(torch.uint8)])

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return decode_by_adding(self, payload, n, key)

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        if fresh:
            total.zero_()
        k = self.count_sent(len(total))
        values = payload[: 4 * k].clone().view(torch.float32)
        places = payload[4 * k :].clone().view(torch.int16 if len(total) <= 2**15 else torch.int32)
        total.index_add_(0, places.int(), values, alpha=alpha)


def largest_indices(x: Tensor, k: int) -> Tensor:
    """The places of the k values of x with the largest magnitude: (k,) int64. NaN counts as largest.

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
