"""What checks of channels on ranks share: a channel, gradients, a step, the exact sum."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import RandomKey
from hvdtrain.compression.reducer import CompressedReducer, ReducerOptions
from hvdtrain.compression.spec import make_codec, parse_compression

numbers = itertools.count(1)


def at_once(text: str) -> str:
    """A specification without a warm-up, unless it has one of its own."""
    return text if "warmup" in text else f"{text},warmup=0"


def channel(text: str, shapes: list[tuple[int, int]], number: int | None = None) -> CompressedReducer:
    """A channel as the exchange makes it. number: its name and its randomness; one that no other has, if not given."""
    spec, key = (
        parse_compression(at_once(text)),
        RandomKey(0, 0, next(numbers) if number is None else number, collectives.rank()),
    )
    codec = make_codec(spec, spec.argument, shapes, key, torch.device("cpu"))
    flat = torch.zeros(sum(n * m for n, m in shapes))
    options = ReducerOptions(feedback=spec.feedback, warmup=spec.warmup, momentum=spec.momentum)
    return CompressedReducer(f"checks.{key.bucket}", flat, codec, key, options)


def gradient(step: int, n: int) -> Tensor:
    """(n,) this rank's, of magnitudes over some orders."""
    generator = torch.Generator().manual_seed(1000 * collectives.rank() + step)
    return torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()


def exchange(c: CompressedReducer, step: int, flat: Tensor) -> Tensor:
    """The sum over ranks as every rank has decoded it, in the channel's own memory."""
    c.flat.copy_(flat)
    c.start_reduction(step)
    c.start_second_round()
    c.finish_reduction()
    if c.sum_is_finite():
        c.commit_step()
    return c.flat


def summed(x: Tensor) -> NDArray[np.float64]:
    """The sum over ranks in float64."""
    return collectives.sum_float64(x.double().numpy(), f"checks.sum.{len(x)}")
