"""Random values at places that all ranks know, so that an all-reduce adds them (Stich et al., 1809.07599)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, Key


@dataclass(frozen=True)
class RandomK:
    """One value, drawn anew each step, of every `1 / ratio` neighbouring ones; no place is sent.

    unbiased: multiply by 1 / ratio, so that the mean is right, for use without error feedback.
    """

    ratio: float = 0.01
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
        """(ceil(n / group),) int64; a last, smaller group is drawn from alike, and its place may lie behind the end."""
        groups = -(-n // self.group)
        drawn = torch.randint(self.group, (groups,), generator=key.generator(device, shared=True), device=device)
        return torch.arange(groups, device=device) * self.group + drawn

    def encode(self, x: Tensor, key: Key) -> Tensor:
        """(n,) -> (ceil(n / group),) float32"""
        places = self.places(len(x), key, x.device)
        values = x[places.clamp(max=len(x) - 1)].float()
        # A group behind whose end the place lies sends nothing this time.
        return torch.where(places < len(x), values * (self.group if self.unbiased else 1), torch.zeros_like(values))

    def decode(self, payload: Tensor, n: int, key: Key) -> Tensor:
        places = self.places(n, key, payload.device)
        within = places < n
        return torch.zeros(n, device=payload.device).index_put_((places[within],), payload[within].float())
