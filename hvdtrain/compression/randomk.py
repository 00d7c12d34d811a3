"""Random values at places that all ranks know, so that an all-reduce adds them (Stich et al., 1809.07599)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, RandomKey, decode_by_adding


@dataclass(frozen=True)
class RandomK:
    """One value, drawn anew each step, of every `1 / ratio` neighbouring ones; no place is sent.

    unbiased: multiply by 1 / ratio, so that the mean is right without error feedback. A specification means this unless
    it says otherwise: what is kept comes tens of steps late, and under momentum that costs more accuracy than the noise
    (digits with min=64: 98.6 % as with none, and with feedback 91.2; tests/benchmarks/accuracy.py).
    """

    ratio: float = 0.25
    unbiased: bool = False
    collective: Collective = "sum"
    block_size: int = 1

    @property
    def feedback(self) -> bool:
        return not self.unbiased

    @property
    def group_size(self) -> int:
        return max(1, round(1 / self.ratio))

    def draw_indices(self, n: int, key: RandomKey, device: torch.device) -> Tensor:
        """(ceil(n / group),) int64; a last, smaller group is drawn from alike, and its place may lie behind the end."""
        groups = -(-n // self.group_size)
        drawn = torch.randint(
            self.group_size, (groups,), generator=key.make_generator(device, shared=True), device=device
        )
        return torch.arange(groups, device=device) * self.group_size + drawn

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(n,) -> (ceil(n / group),) float32"""
        places = self.draw_indices(len(x), key, x.device)
        values = x[places.clamp(max=len(x) - 1)].float()
        if self.unbiased:
            values *= self.group_size
        # A group behind whose end the place lies sends nothing this time. What is not looked at must not hide a NaN.
        return values.mul_(places < len(x)).add_(x.sum() * 0)

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return decode_by_adding(self, payload, n, key)

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        if fresh:
            total.zero_()
        places = self.draw_indices(len(total), key, payload.device)
        total.index_add_(0, places.clamp(max=len(total) - 1), payload * (places < len(total)), alpha=alpha)
