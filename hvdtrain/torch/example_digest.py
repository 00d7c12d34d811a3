"""A hash of an example's content, by which ranks and runs find out whether they read the same data."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import hashlib
import pathlib
import struct
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# Of the standard library: objects whose repr is all that they are.
REPR_TYPES = (
    *(bool, int, complex, type(None), type(Ellipsis), range, slice, uuid.UUID, decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, pathlib.PurePath),
)


def digest_example(example: Any) -> str:
    """Return a hash of an example's content, the same in every process.

    Of values that cannot be hashed only the type counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    _digest_value(digest, example, 0)
    return digest.hexdigest()


def _digest_value(digest: hashlib.blake2b, value: Any, depth: int) -> None:
    """Add a value to a hash: its type, its size and its bytes or parts."""
    kind = type(value).__qualname__.encode()
    digest.update(b"<%d:%s" % (len(kind), kind))
    if depth > 20:  # a structure that contains itself
        return
    if isinstance(value, torch.Tensor):
        _digest_tensor(digest, value)
    elif isinstance(value, np.ndarray):
        digest.update(repr((value.shape, value.dtype.str)).encode())
        if value.dtype.hasobject:
            _digest_value(digest, value.tolist(), depth + 1)
        else:
            digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, np.generic):
        digest.update(value.dtype.str.encode() + value.tobytes())
    elif isinstance(value, float):
        digest.update(struct.pack("<d", value))
    elif isinstance(value, str):
        digest.update(b"%d:" % len(value) + value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        digest.update(b"%d:" % len(value) + bytes(value))
    elif isinstance(value, enum.Enum):
        digest.update(value.name.encode())
    elif isinstance(value, REPR_TYPES):
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        items = sorted((digest_example(key), item) for key, item in value.items()) if _has_unique_keys(value) else []
        digest.update(b"%d:" % len(value))
        for key, item in items:
            digest.update(key.encode())
            _digest_value(digest, item, depth + 1)
    elif isinstance(value, (set, frozenset)):
        digest.update("".join(sorted(map(digest_example, value))).encode())
    elif isinstance(value, (list, tuple)):
        digest.update(b"%d:" % len(value))
        for item in value:
            _digest_value(digest, item, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            digest.update(field.name.encode())
            _digest_value(digest, getattr(value, field.name, None), depth + 1)
    elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # an image of PIL
        digest.update(repr((value.mode, value.size)).encode() + value.tobytes())


def _has_unique_keys(value: Mapping[Any, Any]) -> bool:
    """Return whether all keys differ by their content."""
    return len({digest_example(key) for key in value}) == len(value)


def _digest_tensor(digest: hashlib.blake2b, tensor: torch.Tensor) -> None:
    tensor = tensor.detach()
    digest.update(repr((tuple(tensor.shape), str(tensor.dtype), str(tensor.layout))).encode())
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        for part in (tensor.indices(), tensor.values()):
            _digest_tensor(digest, part)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            _digest_tensor(digest, part)
    elif tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested:
        tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
