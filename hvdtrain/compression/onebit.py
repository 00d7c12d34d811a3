"""One bit a value: the sign, scaled by the mean magnitude of its block (Seide et al., 2014; EF-SignSGD, 1901.09847)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hvdtrain.compression.codec import Collective, Key
from hvdtrain.compression.packing import in_blocks, join, pack_bits, split, unpack_bits


@dataclass(frozen=True)
class OneBit:
    """Signs in bits and a scale a block; of use with error feedback only."""

    collective: Collective = "exchange"
    feedback: bool = True
    block: int = 1024

    def encode(self, x: Tensor, key: Key) -> Tensor:
        """(rows, n) -> (rows, n / 8 + 4 n / block) uint8"""
        scale = in_blocks(x.float(), self.block).abs().mean(-1)
        return join(pack_bits(x >= 0), scale)

    def decode(self, payload: Tensor, n: int, key: Key) -> Tensor:
        packed, scale = split(payload, n // 8, n // self.block)
        signs = unpack_bits(packed).float().mul_(2).sub_(1)
        return in_blocks(signs, self.block).mul_(scale.unsqueeze(-1)).flatten(-2)
