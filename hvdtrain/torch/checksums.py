"""A number for each tensor that every one of its bits goes into, to compare replicas by."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per value
BLOCK = 1 << 18  # values at once: their 64-bit copies take 2 MiB
FACTOR = 6364136223846793005  # odd, so that multiplying loses no bit


def checksums(model: nn.Module) -> dict[str, int]:
    """Of each tensor of the state that a checkpoint would hold, by name, in the model's order."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = [checksum(tensor) for tensor in tensors.values()]
    # One trip from a GPU for all.
    values = torch.stack([value.to(found[0].device) for value in found]).tolist() if found else []
    return dict(zip(tensors, values, strict=True))


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit number of the tensor's bits, without a rounding: another for any tensor that differs in one value.

    It is the sum of the values' bits, each times a number of its own place, modulo 2**64; so values that change places
    count too. Where several values differ, it is the same by chance only, less than once in billions.
    """
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    bits = values.contiguous().reshape(-1).view(BITS[values.element_size()])
    weights = odd_numbers(min(BLOCK, len(bits)), bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for block in torch.split(bits, BLOCK):
        if block.dtype == torch.int64:
            # Or two signs that change would cancel each other: what is beyond the highest bit is lost.
            block = fold(block)
        total = total * FACTOR + (block.to(torch.int64) * weights[: len(block)]).sum()
    return total


@functools.lru_cache(maxsize=8)
def odd_numbers(count: int, device: torch.device) -> Tensor:
    """(count,) odd 64-bit numbers without a pattern, the same everywhere; odd, so that multiplying loses no bit."""
    places = torch.arange(1, count + 1, device=device) * FACTOR
    return fold(fold(places) * FACTOR) | 1


def fold(numbers: Tensor) -> Tensor:
    """64-bit numbers with the upper half of their bits mixed into the lower; different ones stay different."""
    return numbers ^ ((numbers >> 32) & 0xFFFFFFFF)
