"""Random values at places that all ranks know, so that an all-reduce adds them (Stich et al., 1809.07599)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, Key, decode_by_adding


@dataclass(frozen=True)
class RandomK:
    """One of every `1 / ratio` neighbouring values, in turns that begin at a random one; no place is sent.

    In turns, because a place drawn anew each step leaves some values waiting for many times 1 / ratio steps, and
    gradients that come late cost accuracy. Over the seeds each place is as likely as any other in each step.
    unbiased: multiply by 1 / ratio, so that the mean is right, for use without error feedback.
    """

    ratio: float = 0.1
    unbiased: bool = False
    collective: Collective = "sum"
    block: int = 1

    @property
    def feedback(self) -> bool:
        return not self.unbiased

    @property
    def group(self) -> int:
        return max(1, round(1 / self.ratio))

    def places(self, n: int, key: Key, device: torch.device) -> Tensor:
        """(ceil(n / group),) int64; a last, smaller group takes turns alike, and its place may lie behind the end."""
        groups = -(-n // self.group)
        generator = replace(key, step=0).generator(device, shared=True)
        first = torch.randint(self.group, (groups,), generator=generator, device=device)
        return torch.arange(groups, device=device) * self.group + (first + key.step) % self.group

    def encode(self, x: Tensor, key: Key) -> Tensor:
        """(n,) -> (ceil(n / group),) float32"""
        places = self.places(len(x), key, x.device)
        values = x[places.clamp(max=len(x) - 1)].float()
        if self.unbiased:
            values *= self.group
        # A group behind whose end the place lies sends nothing this time. What is not looked at must not hide a NaN.
        return values.mul_(places < len(x)).add_(x.sum() * 0)

    def decode(self, payload: Tensor, n: int, key: Key) -> Tensor:
        return decode_by_adding(self, payload, n, key)

    def add(self, total: Tensor, payload: Tensor, key: Key, alpha: float = 1, fresh: bool = False) -> None:
        if fresh:
            total.zero_()
        places = self.places(len(total), key, payload.device)
        total.index_add_(0, places.clamp(max=len(total) - 1), payload * (places < len(total)), alpha=alpha)
