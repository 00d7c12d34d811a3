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

from hvdtrain.comm.agreement import ConsistentPart
from hvdtrain.recipe.framework import SPLITS, Split
from hvdtrain.system.errors import UserError
from hvdtrain.torch.data import BatchDataset
from hvdtrain.torch.hyperparameters import ParamGroup, StateDict, get_hyperparameters
from hvdtrain.torch.splits import SplitLoaders

EXAMPLES_INDEX = 2  # the place of the examples among `step_parts`
# Of the standard library: objects whose repr is all that they are.
REPR_TYPES = (
    *(bool, int, complex, type(None), type(Ellipsis), range, slice, uuid.UUID, decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, pathlib.PurePath),
)


def describe_tensor(tensor: torch.Tensor) -> str:
    """`(4, 1) float32`"""
    if is_lazy(tensor):
        return f"not initialized, {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def model_parts(model: nn.Module) -> list[ConsistentPart]:
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
        ConsistentPart("parameters", parameters, difference),
        ConsistentPart("buffers", buffers, difference),
    ]


def check_same_model(model: nn.Module, saved: StateDict) -> None:
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


def optimizer_part(
    optimizer: torch.optim.Optimizer, model: nn.Module, hyperparameters: Sequence[ParamGroup]
) -> ConsistentPart:
    """An optimizer's class, and of each group its settings and the names of its parameters."""
    names = {p: name for name, p in model.named_parameters()}
    values = {"the optimizer": type(optimizer).__name__}
    for place, (group, given) in enumerate(zip(optimizer.param_groups, hyperparameters, strict=True), 1):
        for name, value in given.items():
            values[f"{name} of the optimizer's group {place}"] = repr(value)
        own = [names.get(p, "not of the model") for p in group["params"]]
        values |= {f"parameter {i} of the optimizer's group {place}": name for i, name in enumerate(own, 1)}
    return ConsistentPart("optimizer", values, "{who}: {key} is {here}, {base} has {there}")


def choose_compared_ids(count: int) -> list[int]:
    """The examples whose content is compared: the first, the middle and the last one."""
    return sorted({0, count // 2, count - 1}) if count else []


@dataclasses.dataclass(frozen=True)
class SeededExamples:
    """A split's examples, each with its randomness seeded."""

    count: int
    load_example: Callable[[int], Any]


def get_seeded_examples(splits: SplitLoaders) -> dict[Split, SeededExamples]:
    """What returns the examples of each split as the first epoch draws them."""

    def wrap_examples(examples: BatchDataset) -> SeededExamples:
        return SeededExamples(len(examples), lambda i: examples.load_example(i, [splits.seed, 0]))

    return {split: wrap_examples(loader.examples) for split, loader in splits.loaders.items()}


def examples_part(getters: Mapping[Split, SeededExamples]) -> ConsistentPart:
    """The content of three examples of each split."""

    def compute_digests() -> dict[str, str]:
        found = {}
        for split, getter in getters.items():
            for i in choose_compared_ids(getter.count):
                found[f"dataset({split!r})[{i}]"] = digest_example(getter.load_example(i))
        return found

    difference = "{who}: {key} differs from {base}'s (file order? sort the list of files)"
    return ConsistentPart("examples", compute_digests(), difference, recompute=compute_digests)


def select_split_hashes(examples: ConsistentPart, split: Split) -> dict[str, str]:
    """The hashes of the examples of one split."""
    return {name: digest for name, digest in examples.values.items() if name.startswith(f"dataset({split!r})")}


def find_changed_hash(examples: ConsistentPart, earlier: Mapping[str, str]) -> str | None:
    """The name of the first example whose hash is another one than it was, though it is the same each time now."""
    if all(examples.values.get(name, digest) == digest for name, digest in earlier.items()):
        return None
    stable = examples.find_stable_values()
    return next((name for name, digest in earlier.items() if stable.get(name, digest) != digest), None)


def lengths_part(counts: Mapping[Split, int]) -> ConsistentPart:
    """The number of examples of each split; 0 if there is none."""
    difference = (
        "the recipe's {key} dataset has {here} examples on {rank} and {there} on {base}: all ranks need the same data "
        "({who})"
    )
    return ConsistentPart("datasets", {repr(split): str(counts.get(split, 0)) for split in SPLITS}, difference)


def metrics_part(metrics: Sequence[str]) -> ConsistentPart:
    """The names of the scores."""
    return ConsistentPart("metrics", {"scores": ", ".join(metrics)}, "{who}: {key} are {here}, {base} has {there}")


def step_parts(
    device: torch.device, examples: Mapping[Split, SeededExamples], model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[ConsistentPart]:
    """What has to be the same on all ranks before anything of them is joined; the examples are at EXAMPLES."""
    return [
        ConsistentPart("devices", {"--device": device.type}, "{key} is {here} on {who}, {there} on {base}"),
        lengths_part({split: getter.count for split, getter in examples.items()}),
        examples_part(examples),
        *model_parts(model),
        optimizer_part(optimizer, model, get_hyperparameters(optimizer.param_groups)),
    ]


def digest_example(example: Any) -> str:
    """A hash of an example's content, the same in every process; what cannot be hashed counts by its type only."""
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
    """Whether keys can be told apart by their content."""
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
