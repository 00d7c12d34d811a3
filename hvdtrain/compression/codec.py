"""What every codec is: an encoding of a flat tensor, its decoding, and the collective that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Collective = Literal["sum", "exchange", "gather"]


@dataclass(frozen=True)
class RandomKey:
    """Where randomness comes from: never the global generators, and never what was drawn before."""

    seed: int
    step: int
    bucket: int
    rank: int
    round: int = 0  # the second encoding of an exchange must not draw what the first did

    def make_generator(self, device: torch.device, *, shared: bool) -> torch.Generator:
        """A generator that is the same on all ranks (shared) or this rank's own."""
        mixed = hash((self.seed, self.step, self.bucket, -1 if shared else self.rank, self.round)) & (2**63 - 1)
        return torch.Generator(device).manual_seed(mixed)


class Codec(Protocol):
    """A way to send x: floating values in (n,), or in (rows, n) for the collective "exchange".

    collective:
        sum       payloads are added by an all-reduce, and decoding the sum gives the sum (decoding is linear)
        exchange  each rank's part of x travels as bytes to the rank that adds it up, and the sum comes back as bytes
        gather    each rank's payload, bytes, goes to all ranks, which decode and add all of them
    feedback: whether what a step does not send is worth keeping for the next (Karimireddy et al., 1901.09847).
    block: n must be a multiple of it for "exchange".
    A value of x that is not finite must decode to one that is not; for "sum" the payload must hold one.
    """

    @property
    def collective(self) -> Collective: ...
    @property
    def feedback(self) -> bool: ...
    @property
    def block_size(self) -> int: ...

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """x -> payload; the shape of the payload depends on the shape of x only."""

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        """payload -> float32 in the shape that x had, n being its last size."""


class AddingCodec(Codec, Protocol):
    """A codec for "sum" or "gather"; it needs no dense copy of what a payload stands for."""

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        """Add alpha times the decoded payload to total, (n,) float32; fresh: overwrite total with it."""


def decode_by_adding(codec: AddingCodec, payload: Tensor, n: int, key: RandomKey) -> Tensor:
    total = torch.empty(n, device=payload.device)
    codec.add_decoded(total, payload, key, fresh=True)
    return total
