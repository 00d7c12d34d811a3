"""Half the bits: float16 or bfloat16 values as bytes, added up in float32; or float16 added by the all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, RandomKey


@dataclass(frozen=True)
class Fp16:
    """float16 values, added by the all-reduce itself: the cheapest halving on GPUs. The sum overflows at 65,504."""

    collective: Collective = "sum"
    feedback: bool = False
    block_size: int = 1

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(n,) -> (n,) float16"""
        return x.to(torch.float16)

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return payload.float()

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        if fresh:
            torch.mul(payload, alpha, out=total)
        else:
            total.add_(payload, alpha=alpha)


@dataclass(frozen=True)
class Cast:
    """float16 or bfloat16 values as bytes, added up in float32 by the rank that owns a part.

    For bfloat16, which Horovod cannot add, and for float16 on CPUs, whose all-reduce adds it several times slower.
    """

    dtype: torch.dtype
    collective: Collective = "exchange"
    feedback: bool = False
    block_size: int = 1

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(rows, n) -> (rows, 2 n) uint8"""
        return x.to(self.dtype).view(torch.uint8)

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return payload.view(self.dtype).float()
