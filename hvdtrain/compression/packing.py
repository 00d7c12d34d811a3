"""Laying encoded values into rows of bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def reshape_to_blocks(x: Tensor, size: int) -> Tensor:
    """(..., n) -> (..., n / size, size)"""
    return x.reshape(*x.shape[:-1], -1, size)


def join_scales(values: Tensor, scales: Tensor) -> Tensor:
    """(rows, b) uint8 and (rows, s) float32 -> (rows, b + 4 s) uint8"""
    return torch.cat([values, scales.float().contiguous().view(torch.uint8)], -1)


def split_scales(payload: Tensor, value_bytes: int, scales: int) -> tuple[Tensor, Tensor]:
    """Undo `join_scales`: return (rows, b) uint8 and (rows, scales) float32."""
    values, rest = torch.split(payload, [value_bytes, 4 * scales], -1)
    # A view as float32 needs 4-byte alignment, which a slice lacks.
    return values, rest.clone(memory_format=torch.contiguous_format).view(torch.float32)


def pack_bits(bits: Tensor) -> Tensor:
    """(..., n) bool -> (..., n / 8) uint8, the first value in the lowest bit."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))
    return pack_bits_by_torch(bits)


def pack_bits_by_torch(bits: Tensor) -> Tensor:
    """`pack_bits` on any device; on a CPU numpy is faster."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (reshape_to_blocks(bits, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Undo `pack_bits`: (..., n / 8) uint8 -> (..., n) uint8 of 0 and 1."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.contiguous().numpy(), axis=-1, bitorder="little"))
    return unpack_bits_by_torch(packed)


def unpack_bits_by_torch(packed: Tensor) -> Tensor:
    """`unpack_bits` on any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)
