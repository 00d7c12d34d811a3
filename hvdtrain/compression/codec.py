"""What every codec is: an encoding of a flat tensor, its decoding, and the collective that carries it."""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.system.seeds import derive_seed


class Collective(enum.Enum):
    """How payloads are summed over ranks.

    ALL_REDUCE: an all-reduce adds payloads; decoding the sum gives the sum (decoding is linear).
    REDUCE_SCATTER: each rank's part of x travels as bytes to the rank that sums that part, and the sum comes back as
        bytes: a reduce-scatter and an all-gather, by all-to-all, with an encoding before each.
    ALL_GATHER: each rank's payload, bytes, goes to all ranks, which decode and add all of them.
    """

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"


@dataclass(frozen=True)
class RandomKey:
    """Where randomness comes from: never the global generators, and never what was drawn before."""

    seed: int
    step: int
    bucket: int
    rank: int
    round: int = 0  # the second encoding of a reduce-scatter must not draw what the first did

    def make_generator(self, device: torch.device, *, shared: bool) -> torch.Generator:
        """Return a generator that is the same on all ranks (shared) or this rank's own."""
        seed = derive_seed(self.seed, self.step, self.bucket, -1 if shared else self.rank, self.round)
        return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class BucketContext:
    """What a codec is made for."""

    argument: Any  # the value of the method's argument (as its `Argument.parse` returns it); None if it has none
    feedback: bool | None  # error feedback as the user wants it; None: as the codec has it by default
    shapes: Sequence[tuple[int, int]]  # the bucket's parameters as matrices, in the order in which they lie in it
    key: RandomKey
    device: torch.device
    scatters: bool = False  # each rank is to have the sum of its own part only: that takes a REDUCE_SCATTER codec


class Codec(abc.ABC):
    """A way to send x: floating values in (n,), or in (rows, n) for Collective.REDUCE_SCATTER.

    A value of x that is not finite must decode to one that is not; for ALL_REDUCE the payload must hold one. A scale
    that is computed from the values (a mean, a maximum) keeps it; a constant scale does not.
    """

    collective: Collective
    block_size: int = 1  # n is a multiple of it for REDUCE_SCATTER

    @property
    def feedback(self) -> bool:
        """Whether what a step does not send is kept for the next (error feedback, Karimireddy et al., 1901.09847)."""
        return True

    @classmethod
    def for_bucket(cls, context: BucketContext) -> Codec:
        """Make the codec of a bucket. Default: of the method's argument, if it has one."""
        return cls() if context.argument is None else cls(context.argument)  # type: ignore[call-arg]

    @abc.abstractmethod
    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """Return the payload of x; its shape depends on the shape of x only."""

    @abc.abstractmethod
    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        """Return float32 values in the shape that x had, n being its last size."""

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        """Add alpha times the decoded payload to total, (n,) float32; fresh: overwrite total with it.

        For ALL_REDUCE and ALL_GATHER. Override it if that needs no dense copy of the decoded payload.
        """
        decoded = self.decode(payload, len(total), key)
        if fresh:
            torch.mul(decoded, alpha, out=total)
        else:
            total.add_(decoded, alpha=alpha)


class StatefulCodec(Codec):
    """A codec for ALL_REDUCE whose encoding depends on the steps before, in the same way on all ranks."""

    @abc.abstractmethod
    def advance(self, total: Tensor) -> None:
        """Prepare the next step. total: the sum of all ranks' payloads in this step."""

    @abc.abstractmethod
    def parameter_states(self) -> list[Any]:
        """Return the state, an entry for each parameter of the bucket; checkpoints hold these by parameter.

        Entries consist of tensors, which the codec no longer changes, numbers, strings, tuples, lists and dicts.
        """

    @abc.abstractmethod
    def load_parameter_states(self, states: Sequence[Any]) -> None:
        """Take over a state; None stands for a parameter that had none. One that does not fit is left out."""


class FusedCodec(Codec):
    """A codec that encodes a bucket parameter by parameter, each in one pass through memory with its error feedback."""

    @abc.abstractmethod
    def encode_fused(self, index: int, total: Tensor, residual: Tensor, gradient: Tensor) -> None:
        """Set one parameter's total to residual + gradient less what of that is sent; keep the payload.

        Args:
            index: of the parameter in the bucket.
            total: its part of the next residual, written: shaped like the context's matrix of it, float32.
            residual: its part of the residual: the same shape, float32.
            gradient: the same shape, any floating type.
        """

    @abc.abstractmethod
    def pop_fused_payload(self) -> Tensor:
        """Return the payload of all parameters, as `encode` would, and forget it."""


def decode_by_adding(codec: Codec, payload: Tensor, n: int, key: RandomKey) -> Tensor:
    """Decode by `codec.add_decoded`: (n,) float32."""
    total = torch.empty(n, device=payload.device)
    codec.add_decoded(total, payload, key, fresh=True)
    return total
