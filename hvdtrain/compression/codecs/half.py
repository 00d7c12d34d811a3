"""Half the bits: float16 or bfloat16 values as bytes, summed in float32; or float16 summed by the all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.codec import BucketContext, Codec, Collective, RandomKey
from hvdtrain.compression.registry import compressor


@dataclass(frozen=True)
class Fp16(Codec):
    """Send float16 values, which the all-reduce itself adds: the cheapest on GPUs. The sum overflows at 65,504."""

    collective = Collective.ALL_REDUCE
    feedback = False

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
class Cast(Codec):
    """Send float16 or bfloat16 values as bytes, which the rank that owns a part sums in float32.

    For bfloat16, whose all-reduce rounds each partial sum, and for float16 on CPUs, whose all-reduce is several times
    slower.
    """

    dtype: torch.dtype

    collective = Collective.REDUCE_SCATTER
    feedback = False

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(rows, n) -> (rows, 2 n) uint8"""
        return x.to(self.dtype).view(torch.uint8)

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return payload.view(self.dtype).float()


@compressor("fp16", auto_candidate=True)
class Float16(Cast):
    """`Cast` to float16 on CPUs and if the sums are scattered, `Fp16` on GPUs."""

    @classmethod
    def for_bucket(cls, context: BucketContext) -> Codec:
        return Fp16() if context.device.type == "cuda" and not context.scatters else Cast(torch.float16)


@compressor("bf16")
class BFloat16(Cast):
    """`Cast` to bfloat16."""

    @classmethod
    def for_bucket(cls, context: BucketContext) -> Codec:
        return Cast(torch.bfloat16)
