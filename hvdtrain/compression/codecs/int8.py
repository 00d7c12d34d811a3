"""8 bits a value and a scale a block, rounded to nearest (Dettmers, 1511.04561; with error feedback)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.codec import Codec, Collective, RandomKey
from hvdtrain.compression.packing import join_scales, reshape_to_blocks, split_scales
from hvdtrain.compression.registry import compressor


@compressor("int8", auto_candidate=True)
@dataclass(frozen=True)
class Int8(Codec):
    """Send each block of values as multiples of a 127th of its largest magnitude."""

    block_size: int = 512

    collective = Collective.REDUCE_SCATTER

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(rows, n) -> (rows, n + 4 n / block) uint8"""
        blocks = reshape_to_blocks(x.float(), self.block_size)
        # Not below the normal floats: a multiple of a subnormal scale could be twice the largest magnitude.
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        # The scale carries what is not finite.
        values = (blocks / scale).nan_to_num_(0.0, 0.0, 0.0).round_().to(torch.int8)
        return join_scales(values.flatten(-2).view(torch.uint8), scale.squeeze(-1))

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        values, scale = split_scales(payload, n, n // self.block_size)
        blocks = reshape_to_blocks(values.view(torch.int8), self.block_size).float()
        return blocks.mul_(scale.unsqueeze(-1)).flatten(-2)
