"""One bit a value: the sign, scaled by the mean magnitude of its block (Seide et al., 2014; EF-SignSGD, 1901.09847)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hvdtrain.compression.codec import Codec, Collective, RandomKey
from hvdtrain.compression.packing import join_scales, pack_bits, reshape_to_blocks, split_scales, unpack_bits
from hvdtrain.compression.registry import compressor


@compressor("onebit", auto_candidate=True)
@dataclass(frozen=True)
class OneBit(Codec):
    """Send a bit for each sign and a scale for each block; it converges with error feedback only."""

    block_size: int = 1024

    collective = Collective.REDUCE_SCATTER

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(rows, n) -> (rows, n / 8 + 4 n / block) uint8"""
        scale = reshape_to_blocks(x.float(), self.block_size).abs().mean(-1)
        return join_scales(pack_bits(x >= 0), scale)

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        packed, scale = split_scales(payload, n // 8, n // self.block_size)
        signs = unpack_bits(packed).float().mul_(2).sub_(1)
        return reshape_to_blocks(signs, self.block_size).mul_(scale.unsqueeze(-1)).flatten(-2)
