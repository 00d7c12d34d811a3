"""Sends one of every N values, others in each step; with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvdtrain.compression.arguments import PositiveInteger
from hvdtrain.compression.codec import BucketContext, Collective, RandomKey, StatefulCodec
from hvdtrain.compression.registry import compressor


@compressor("halves", argument=PositiveInteger("stride", "values of which one is sent", default=2), auto_candidate=True)
class Halves(StatefulCodec):
    collective = Collective.ALL_REDUCE

    def __init__(self, stride: int, parameters: int) -> None:
        self.stride, self.parameters, self.phase = stride, parameters, 0

    @classmethod
    def for_bucket(cls, context: BucketContext) -> Halves:
        return cls(context.argument, len(context.shapes))

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        padded = torch.cat([x, x.new_zeros(-len(x) % self.stride)])
        return padded[self.phase :: self.stride].float() + x.sum() * 0

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        total = torch.zeros(len(payload) * self.stride)
        total[self.phase :: self.stride] = payload
        return total[:n]

    def advance(self, total: Tensor) -> None:
        self.phase = (self.phase + 1) % self.stride

    def parameter_states(self) -> list[int]:
        return [self.phase] * self.parameters

    def load_parameter_states(self, states: Sequence[Any]) -> None:
        if states[0] is not None:
            self.phase = states[0] % self.stride
