"""Random values at indices that all ranks know, so that an all-reduce adds them (Stich et al., 1809.07599)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.arguments import Fraction
from hvdtrain.compression.codec import BucketContext, Codec, Collective, RandomKey, decode_by_adding
from hvdtrain.compression.registry import compressor


@compressor("randomk", argument=Fraction("fraction of the values that is sent", default=0.25), dense_steps=100)
@dataclass(frozen=True)
class RandomK(Codec):
    """Send one value, drawn again each step, of every `1 / ratio` neighbouring ones; no index is sent.

    unbiased: multiply by 1 / ratio, so that the mean is right without error feedback. A specification means this unless
    it has `feedback=on`: what is kept comes tens of steps late, and under momentum that costs more accuracy than the
    noise (digits with min=64: 98.6 % as with none, and with feedback 91.2; tests/benchmarks/accuracy.py).
    """

    ratio: float = 0.25
    unbiased: bool = False

    collective = Collective.ALL_REDUCE

    @classmethod
    def for_bucket(cls, context: BucketContext) -> RandomK:
        return cls(context.argument, unbiased=context.feedback is not True)

    @property
    def feedback(self) -> bool:
        return not self.unbiased

    @property
    def group_size(self) -> int:
        """Neighbouring values of which one is sent."""
        return max(1, round(1 / self.ratio))

    def draw_indices(self, n: int, key: RandomKey, device: torch.device) -> Tensor:
        """Return (ceil(n / group),) int64; of a last, smaller group the index may be after the end."""
        groups = -(-n // self.group_size)
        drawn = torch.randint(
            self.group_size, (groups,), generator=key.make_generator(device, shared=True), device=device
        )
        return torch.arange(groups, device=device) * self.group_size + drawn

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(n,) -> (ceil(n / group),) float32"""
        indices = self.draw_indices(len(x), key, x.device)
        values = x[indices.clamp(max=len(x) - 1)].float()
        if self.unbiased:
            values *= self.group_size
        # If the index is after the end, the group sends nothing this time. Values not sent must not hide a NaN.
        return values.mul_(indices < len(x)).add_(x.sum() * 0)

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return decode_by_adding(self, payload, n, key)

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        if fresh:
            total.zero_()
        indices = self.draw_indices(len(total), key, payload.device)
        total.index_add_(0, indices.clamp(max=len(total) - 1), payload * (indices < len(total)), alpha=alpha)
