"""What of a torch recipe has to be the same on all ranks, in a form that can be compared."""

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hvdtrain.collectives.agreement import Part
from hvdtrain.errors import UserError

# Of the standard library: objects whose repr is all that they are.
BY_REPR = (
    *(bool, int, complex, type(None), type(Ellipsis), range, slice, uuid.UUID, decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, pathlib.PurePath),
)


def describe_tensor(tensor: torch.Tensor) -> str:
    """`(4, 1) float32`"""
    if is_lazy(tensor):
        return f"not initialized, {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def model_parts(model: nn.Module) -> list[Part]:
    """The parameters and buffers of a model by their place: name, shape, dtype, and whether a parameter is trained."""
    parameters = {
        f"parameter {place}": f"{name!r} {describe_tensor(p)}{'' if p.requires_grad else ', frozen'}"
        for place, (name, p) in enumerate(model.named_parameters(), 1)
    }
    buffers = {
        f"buffer {place}": f"{name!r} {describe_tensor(b)}" for place, (name, b) in enumerate(model.named_buffers(), 1)
    }
    difference = "{who}: {key} is {here}, {base} has {there}"
    return [
        Part("parameters", parameters, difference),
        Part("buffers", buffers, difference),
    ]


def refuse_other_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raise UserError, naming the first, if parameters or buffers of a checkpoint have other names or shapes."""
    now = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    there = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    for name in [*now, *there]:
        if name not in there:
            text = f"it has no {name!r}, which is {describe_tensor(now[name])} in this run"
        elif name not in now:
            text = f"it has {name!r} {describe_tensor(there[name])}, which this run has not"
        elif now[name].shape != there[name].shape and not is_lazy(now[name]):
            here, saved_one = describe_tensor(now[name]), describe_tensor(there[name])
            text = f"size mismatch for {name!r}: {saved_one} in it, {here} in this run"
        else:
            continue
        raise UserError(f"the checkpoint is of another model or optimizer: {text}")


def optimizer_part(optimizer: torch.optim.Optimizer, model: nn.Module, settings: Sequence[Mapping[str, Any]]) -> Part:
    """An optimizer's class, and of each group its settings and the names of its parameters."""
    names = {p: name for name, p in model.named_parameters()}
    values = {"the optimizer": type(optimizer).__name__}
    for place, (group, given) in enumerate(zip(optimizer.param_groups, settings, strict=True), 1):
        for name, value in given.items():
            values[f"{name} of the optimizer's group {place}"] = repr(value)
        own = [names.get(p, "not of the model") for p in group["params"]]
        values |= {f"parameter {i} of the optimizer's group {place}": name for i, name in enumerate(own, 1)}
    return Part("optimizer", values, "{who}: {key} is {here}, {base} has {there}")


def compared_ids(count: int) -> list[int]:
    """The examples whose content is compared: the first, the middle and the last one."""
    return sorted({0, count // 2, count - 1}) if count else []


def examples_part(get: Mapping[str, Callable[[int], Any]], counts: Mapping[str, int]) -> Part:
    """The content of three examples of each split.

    Args:
        get: of each split, what returns an example by its id, with its randomness seeded.
        counts: the number of examples of each split.
    """

    def digests() -> dict[str, str]:
        found = {}
        for split, example in get.items():
            for i in compared_ids(counts[split]):
                found[f"dataset({split!r})[{i}]"] = digest_example(example(i))
        return found

    difference = "{who}: {key} differs from {base}'s (file order? sort the list of files)"
    return Part("examples", digests(), difference, again=digests)


def lengths_part(counts: Mapping[str, int]) -> Part:
    """The number of examples of each split."""
    difference = (
        "the recipe's {key} dataset has {here} examples on {rank} and {there} on {base}: all ranks need the same data"
    )
    return Part("datasets", {repr(split): str(count) for split, count in counts.items()}, difference + " ({who})")


def digest_example(example: Any) -> str:
    """A hash of an example's content, the same in every process; what cannot be hashed counts by its type only."""
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, example, 0)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any, depth: int) -> None:
    """Add a value to a hash: its type, its size and its bytes or parts."""
    kind = type(value).__qualname__.encode()
    digest.update(b"<%d:%s" % (len(kind), kind))
    if depth > 20:  # a structure that contains itself
        return
    if isinstance(value, torch.Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, np.ndarray):
        digest.update(repr((value.shape, value.dtype.str)).encode())
        if value.dtype.hasobject:
            _add(digest, value.tolist(), depth + 1)
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
    elif isinstance(value, BY_REPR):
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        items = sorted((digest_example(key), item) for key, item in value.items()) if _unique(value) else []
        digest.update(b"%d:" % len(value))
        for key, item in items:
            digest.update(key.encode())
            _add(digest, item, depth + 1)
    elif isinstance(value, (set, frozenset)):
        digest.update("".join(sorted(map(digest_example, value))).encode())
    elif isinstance(value, (list, tuple)):
        digest.update(b"%d:" % len(value))
        for item in value:
            _add(digest, item, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            digest.update(field.name.encode())
            _add(digest, getattr(value, field.name, None), depth + 1)
    elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # an image of PIL
        digest.update(repr((value.mode, value.size)).encode() + value.tobytes())


def _unique(value: Mapping[Any, Any]) -> bool:
    """Whether keys can be told apart by their content."""
    return len({digest_example(key) for key in value}) == len(value)


def _add_tensor(digest: hashlib.blake2b, tensor: torch.Tensor) -> None:
    tensor = tensor.detach()
    digest.update(repr((tuple(tensor.shape), str(tensor.dtype), str(tensor.layout))).encode())
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        for part in (tensor.indices(), tensor.values()):
            _add_tensor(digest, part)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            _add_tensor(digest, part)
    elif tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested:
        tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
