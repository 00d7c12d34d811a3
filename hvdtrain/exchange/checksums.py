"""A number for each tensor that every one of its bits goes into, to compare replicas by.

Knows tensors of any layout, and no models.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hvdtrain.exchange.local_tensors import local_tensor

INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per value
CHECKSUM_BLOCK_VALUES = 1 << 18  # values at once: their 64-bit copies take 2 MiB
ODD_MULTIPLIER = 6364136223846793005  # odd, so that multiplying loses no bit


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold all bits of a tensor: itself, or the parts of a sparse or quantized one.

    Of a DTensor they hold what this rank has.
    """
    tensor = local_tensor(tensor).detach()
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass made of other tensors
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in dense_parts(getattr(tensor, name))]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_quantized and tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.int_repr(), torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    return [tensor.to_dense() if tensor.layout != torch.strided else tensor]


def view_as_bits(tensor: Tensor) -> Tensor:
    """View a plain tensor as integers of the same size (two for a complex number)."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(INTEGER_DTYPES[tensor.element_size()])


def checksum_tensor(tensor: Tensor) -> Tensor:
    """Return () int64 of the tensor's bits, without a rounding: another for any tensor that differs in one value.

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
