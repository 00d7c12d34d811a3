"""The buffers of a model, and by which modes those that training changes are combined over ranks.

A mean is known of torch's normalization layers only. A buffer that changes although nothing is known of it, and the
recipe's `buffers` does not name it, is refused (`hvdtrain.torch.buffer_reducer`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hvdtrain.system.errors import RunError, UserError, suggest_nearest
from hvdtrain.torch.tensors import (
    TensorVersion,
    describe_layer,
    has_same_bits,
    is_finite,
    is_writable_in_place,
    read_version,
)

BufferMode = Literal["mean", "sum", "rank0", "local"]
BUFFER_MODES: tuple[str, ...] = get_args(BufferMode)
# The same on every rank that has examples, because only the weights go into it.
SPECTRAL_NORM_BUFFERS = ("_u", "_v", "weight_u", "weight_v")


@dataclass(eq=False)
class Buffer:
    """One buffer of the model."""

    name: str
    owner: nn.Module
    tensor: Tensor
    mode: BufferMode | None  # None: not known
    is_declared: bool
    version: TensorVersion
    is_reduced: bool = False  # it has changed on some rank: it is reduced in every step
    previous_value: Tensor | None = None  # its value before the step

    @property
    def description(self) -> str:
        return f"{self.name!r} of {describe_layer(self.owner, self.local_name)}"

    @property
    def local_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_persistent(self) -> bool:
        return self.local_name not in self.owner._non_persistent_buffers_set

    def is_float(self) -> bool:
        return self.tensor.is_floating_point() or self.tensor.is_complex()


def resolve_buffer_modes(recipe: str, declared: Mapping[str, str], model: nn.Module) -> dict[str, BufferMode]:
    """Resolve a recipe's `buffers` to the names of a model's buffers; a name overrides a pattern.

    Raises UserError for a name or pattern without a buffer, and for a mode that a buffer cannot have.
    """
    names: dict[int, list[str]] = {}  # of each tensor: a shared one has several
    for name, b in model.named_buffers(remove_duplicate=False):
        names.setdefault(id(b), []).append(name)
    found: dict[str, BufferMode] = {}
    for pattern, mode in sorted(declared.items(), key=lambda item: item[0] in dict(model.named_buffers())):
        if mode not in BUFFER_MODES:
            raise UserError(
                f"{recipe}.buffers: {mode!r} for {pattern!r} is not a mode; expected one of {', '.join(BUFFER_MODES)}"
            )
        matched = [own for own in names.values() if any(fnmatch.fnmatchcase(name, pattern) for name in own)]
        if not matched:
            all_names = [name for own in names.values() for name in own]
            raise UserError(
                f"{recipe}.buffers: the model has no buffer {pattern!r}{suggest_nearest(pattern, all_names)}"
            )
        found |= dict.fromkeys([own[0] for own in matched], cast(BufferMode, mode))
    tensors = dict(model.named_buffers())
    for name, mode in found.items():
        if tensors[name].dtype == torch.bool and mode in ("mean", "sum"):
            raise UserError(
                f"{recipe}.buffers: {name!r} is bool, which has no {mode}; expected 'rank0' or 'local', or an integer "
                "buffer that counts"
            )
        if not is_writable_in_place(tensors[name]) and mode != "local":
            raise UserError(
                f"{recipe}.buffers: {name!r} cannot be written in place (sparse, quantized or expanded); expected "
                "'local', or a dense buffer"
            )
    return found


def find_builtin_mode(owner: nn.Module, key: str) -> BufferMode | None:
    """Return the mode of a buffer of torch's own layers, if there is one."""
    if isinstance(owner, _NormBase):
        return {"running_mean": "mean", "running_var": "mean", "num_batches_tracked": "rank0"}.get(key)  # type: ignore[return-value]
    kind = type(owner).__module__ + "." + type(owner).__name__
    spectral = kind == "torch.nn.utils.parametrizations._SpectralNorm" or any(
        type(hook).__module__ == "torch.nn.utils.spectral_norm" for hook in owner._forward_pre_hooks.values()
    )
    return "rank0" if spectral and key.endswith(SPECTRAL_NORM_BUFFERS) else None


def snapshot_buffers(model: nn.Module) -> list[Buffer]:
    """Return a model's buffers with their values, for `find_changed`."""
    found = []
    for name, b in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        found.append(Buffer(name, owner, b, None, False, read_version(b), previous_value=b.detach().clone()))
    return found


def find_changed_buffers(buffers: Sequence[Buffer]) -> list[str]:
    """Return the names of the buffers whose values are not what they were when they were remembered.

    Raises UserError for one that is another tensor now: nothing that is held would be the model's. Those that are not
    part of the state are caches, and free.
    """
    for b in buffers:
        if b.owner._buffers.get(b.local_name) is not b.tensor and b.is_persistent:
            raise UserError(describe_rebinding(b))
    return [b.name for b in buffers if not has_same_bits(b.tensor, get_previous_value(b))]


def get_previous_value(b: Buffer) -> Tensor:
    """Return the value that was remembered."""
    assert b.previous_value is not None
    return b.previous_value


def describe_rebinding(b: Buffer) -> str:
    """Return the message for a buffer that is another tensor than it was."""
    return (
        f"training rebinds the buffer {b.description} to another tensor, so that it cannot be kept the same on all "
        f"ranks: change it in place, self.{b.local_name}.copy_(...)"
    )


def check_tensors_finite(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise RunError if a tensor of these, by name, is not finite: they are what training changes."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise RunError(f"{name} is not finite; no checkpoint was written")
