"""A number for each tensor that every one of its bits goes into, to compare replicas by."""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from hvdtrain.exchange.tensors import dense_parts, view_as_bits

CHECKSUM_BLOCK_VALUES = 1 << 18  # values at once: their 64-bit copies take 2 MiB
ODD_MULTIPLIER = 6364136223846793005  # odd, so that multiplying loses no bit


def checksum_model(model: nn.Module, leave_out: Collection[str] = ()) -> dict[str, int]:
    """Of each tensor of the state that a checkpoint would hold, by name, in the model's order.

    leave_out: names of tensors that ranks keep for themselves.
    """
    state = model.state_dict().items()
    tensors = {name: value for name, value in state if isinstance(value, Tensor) and name not in leave_out}
    found = [checksum_tensor(tensor) for tensor in tensors.values()]
    # One trip from a GPU for all.
    values = torch.stack([value.to(found[0].device) for value in found]).tolist() if found else []
    return dict(zip(tensors, values, strict=True))


def checksum_tensor(tensor: Tensor) -> Tensor:
    """A 64-bit number of the tensor's bits, without a rounding: another for any tensor that differs in one value.

    It is the sum of the values' bits, each times a number of its own place, modulo 2**64; so values that change places
    count too. If several values differ, it is the same by chance only, less than once in billions.
    """
    parts = [_checksum_bits(view_as_bits(part).contiguous().reshape(-1)) for part in dense_parts(tensor)]
    return functools.reduce(lambda total, part: total * ODD_MULTIPLIER + part.to(total.device), parts)


def _checksum_bits(bits: Tensor) -> Tensor:
    weights = generate_odd_weights(min(CHECKSUM_BLOCK_VALUES, len(bits)), bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for block in torch.split(bits, CHECKSUM_BLOCK_VALUES):
        if block.dtype == torch.int64:
            # Or two signs that change would cancel each other: what is beyond the highest bit is lost.
            block = mix_bits(block)
        total = total * ODD_MULTIPLIER + (block.to(torch.int64) * weights[: len(block)]).sum()
    return total


@functools.lru_cache(maxsize=8)
def generate_odd_weights(count: int, device: torch.device) -> Tensor:
    """(count,) odd 64-bit numbers without a pattern, the same everywhere; odd, so that multiplying loses no bit."""
    places = torch.arange(1, count + 1, device=device) * ODD_MULTIPLIER
    return mix_bits(mix_bits(places) * ODD_MULTIPLIER) | 1


def mix_bits(numbers: Tensor) -> Tensor:
    """64-bit numbers with the upper half of their bits mixed into the lower; different ones stay different."""
    return numbers ^ ((numbers >> 32) & 0xFFFFFFFF)
