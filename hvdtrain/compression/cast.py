"""Half the bits: float16 by all-reduce, bfloat16 as bytes, since Horovod adds no bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, Key


@dataclass(frozen=True)
class Fp16:
    """float16 values, added by the all-reduce itself: the cheapest halving, and it overflows at 65,504."""

    collective: Collective = "sum"
    feedback: bool = False
    block: int = 1

    def encode(self, x: Tensor, key: Key) -> Tensor:
        """(n,) -> (n,) float16"""
        return x.to(torch.float16)

    def decode(self, payload: Tensor, n: int, key: Key) -> Tensor:
        return payload.float()

    def add(self, total: Tensor, payload: Tensor, key: Key, alpha: float = 1) -> None:
        total.add_(payload, alpha=alpha)


@dataclass(frozen=True)
class Bf16:
    """bfloat16 values, added up in float32 by the rank that owns a part: float32's range at half the bytes."""

    collective: Collective = "exchange"
    feedback: bool = False
    block: int = 1

    def encode(self, x: Tensor, key: Key) -> Tensor:
        """(rows, n) -> (rows, 2 n) uint8"""
        return x.to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload: Tensor, n: int, key: Key) -> Tensor:
        return payload.view(torch.bfloat16).float()
