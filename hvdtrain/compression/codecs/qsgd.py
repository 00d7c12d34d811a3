"""A few bits a value, rounded at random so that the mean is right (QSGD, Alistarh et al., 1610.02132)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.compression.arguments import Choice
from hvdtrain.compression.codec import Codec, Collective, RandomKey
from hvdtrain.compression.packing import join_scales, reshape_to_blocks, split_scales
from hvdtrain.compression.registry import compressor

WIDTHS = {"2bit": 2, "4bit": 4, "8bit": 8}


@compressor("qsgd", argument=Choice("bit width", "bits a value: 2bit, 4bit or 8bit", WIDTHS, default="4bit"))
@dataclass(frozen=True)
class Qsgd(Codec):
    """Send each block as multiples of a fraction of its largest magnitude, stochastically rounded: unbiased.

    bits: 2, 4 or 8, sign included. The block's largest magnitude as the scale, instead of the paper's norm, gives less
    variance in blocks of this size (as in CGX, 2111.08617).
    """

    bits: int = 4
    block_size: int = 512

    collective = Collective.REDUCE_SCATTER
    feedback = False

    @property
    def max_level(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(rows, n) -> (rows, n bits / 8 + 4 n / block) uint8"""
        blocks = reshape_to_blocks(x.float(), self.block_size)
        scale = blocks.abs().amax(-1, keepdim=True) / self.max_level
        generator = key.make_generator(x.device, shared=False)
        noise = torch.rand(blocks.shape, generator=generator, device=x.device)
        whole = (blocks / scale).nan_to_num_(0.0, 0.0, 0.0).add_(noise).floor_().add_(self.max_level)
        values = whole.clamp_(0, 2 * self.max_level).to(torch.uint8).flatten(-2)
        per_byte = 8 // self.bits
        if per_byte > 1:
            parts = reshape_to_blocks(values, per_byte).unbind(-1)
            values = parts[0].clone()
            for place, part in enumerate(parts[1:], 1):
                values |= part << (self.bits * place)
        return join_scales(values, scale.squeeze(-1))

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        packed, scale = split_scales(payload, n * self.bits // 8, n // self.block_size)
        mask = (1 << self.bits) - 1
        parts = [(packed >> (self.bits * place)) & mask for place in range(8 // self.bits)]
        values = torch.stack(parts, -1).flatten(-2).float().sub_(self.max_level)
        return reshape_to_blocks(values, self.block_size).mul_(scale.unsqueeze(-1)).flatten(-2)
