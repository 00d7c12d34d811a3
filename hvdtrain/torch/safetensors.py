"""Read .safetensors files: 8 bytes n, n bytes of JSON with each tensor's type, shape and place, and the tensors' bytes.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from hvdtrain.system.strict_json import parse_strict_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def parse_safetensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file by name. Raises ValueError with what is wrong with it."""
    if len(data) < 8:
        raise ValueError("it is shorter than a header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise ValueError(f"its header has {length} bytes, and the file {len(data)}")
    header, body = parse_strict_json(data[8 : 8 + length]), memoryview(data)[8 + length :]
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its entry {name!r} cannot be read: {error}") from None
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or begin < 0 or end - begin != size or end > len(body):
            raise ValueError(f"its entry {name!r} has bytes {begin} to {end} of {len(body)}; expected {size} bytes")
        flat = torch.frombuffer(bytearray(body[begin:end]), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors
