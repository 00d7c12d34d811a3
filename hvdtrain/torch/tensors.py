"""A model's tensors, of any layout: comparing them bit by bit, and overwriting also those that torch does not."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.exchange.checksums import checksum_tensor, dense_parts, view_as_bits
from hvdtrain.exchange.local_tensors import cut_local, is_dtensor, local_tensor
from hvdtrain.torch.hyperparameters import StateDict

# Writing through `.data` leaves no mark: so contents are compared as well, in the first steps and then at intervals.
INITIAL_COMPARED_STEPS, COMPARISON_INTERVAL = 8, 16
DEEPCOPY_LAYOUTS = (torch.strided, torch.sparse_coo)  # layouts that `copy.deepcopy` copies
TensorVersion = tuple[int, int]  # of a tensor: its version and where its memory is


def has_same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same type, shape and bits; NaN equals the same NaN."""
    if (one.dtype, one.shape, one.layout) != (other.dtype, other.shape, other.layout):
        return False
    pairs = list(zip(dense_parts(one), dense_parts(other), strict=True))
    return all(a.shape == b.shape and torch.equal(view_as_bits(a), view_as_bits(b.to(a.device))) for a, b in pairs)


def is_writable_in_place(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, with one place in memory for each value: it can be written in place."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_inference():
        return False
    if hasattr(tensor, "__tensor_flatten__"):
        return False
    return not any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def view_as_real(tensor: Tensor) -> Tensor:
    """Return a tensor as real numbers: (..., 2) of a complex one."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a tensor of any layout are finite."""
    return all(bool(torch.isfinite(part).all()) for part in dense_parts(tensor))


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all values are finite, in one pass through memory: a sum that overflows counts as not finite."""
    sums = []
    for gradient in gradients:
        dense = gradient._values() if gradient.is_sparse else gradient
        values = view_as_real(dense)
        sums.append(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).double())
    # One trip from a GPU for all.
    return not sums or bool(torch.isfinite(torch.stack([total.to(sums[0].device) for total in sums])).all())


def read_version(tensor: Tensor) -> TensorVersion:
    """Return what changes when a tensor is written in place (but through `.data`) or is given other memory."""
    version = -1 if tensor.is_inference() else tensor._version
    plain = tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")
    return version, tensor.data_ptr() if plain else 0


def write_tensors(value: object) -> bytes:
    """Return tensors and plain values as bytes, which `read_tensors` reads."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read_tensors(data: bytes, device: torch.device | None = None) -> Any:
    """Return what `torch.save` has written, of tensors and plain values only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


def is_content_check_due(step: int) -> bool:
    """Return whether contents are compared in a step. step: counted from 0."""
    return step < INITIAL_COMPARED_STEPS or step % COMPARISON_INTERVAL == 0


@torch.no_grad()
def fingerprint_tensors(named: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return a number for each plain tensor that almost any change of its values changes: its norm, or its sum.

    In one pass through memory, without waiting for a GPU.
    """
    plain = [(name, t.detach()) for name, t in named if is_writable_in_place(t) and t.numel()]
    floating = {name: view_as_real(t) for name, t in plain}
    floating = {name: t for name, t in floating.items() if t.is_floating_point() and t.element_size() > 1}
    norms = torch._foreach_norm(list(floating.values())) if floating else ()
    found = {name: norm.nan_to_num() for name, norm in zip(floating, norms, strict=True)}
    return found | {name: view_as_bits(t).sum() for name, t in plain if name not in floating}


def find_differing(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Return the names of those in `now` whose number is another one than in `before`."""
    different = [(now[name] != before[name]).reshape(()) for name in now]
    found = torch.stack([one.to(different[0].device) for one in different]).tolist() if different else []
    return [name for name, differs in zip(now, found, strict=True) if differs]


@torch.no_grad()
def overwrite_tensor(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Give a parameter or buffer of a model new bits: in place if possible, else by putting a copy in its place.

    Nothing is written if the bits are the same already.
    """
    if has_same_bits(old, new):
        return
    if is_dtensor(old) and is_dtensor(new):
        old, new = local_tensor(old), local_tensor(new)
    if is_writable_in_place(old) and old.shape == new.shape:
        old.copy_(new)
        return
    fresh: Tensor = new.to(old.device) if new.device != old.device else new.clone()
    if isinstance(old, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=old.requires_grad)
    for module in model.modules():
        for names in (module._parameters, module._buffers):
            for name, tensor in names.items():
                if tensor is old:
                    names[name] = fresh  # type: ignore[assignment]


def build_deepcopy_memo(model: nn.Module) -> dict[int, Any]:
    """Return copies of those tensors of a model that torch does not deepcopy, as a memo for `copy.deepcopy`."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and (not value.is_leaf or value.layout not in DEEPCOPY_LAYOUTS):
                memo[id(value)] = value.detach().clone()  # the first kind is computed again in each forward pass
    return memo


def describe_layer(model: nn.Module, name: str) -> str:
    """Return the class of the module that has a parameter or buffer, with its article: "a Linear"."""
    layer = type(model.get_submodule(name.rpartition(".")[0])).__name__
    return f"a{'n' * (layer[0] in 'AEIOU')} {layer}"


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers, each once, by its first name."""
    return [*model.named_parameters(), *model.named_buffers()]


def load_module_state(model: nn.Module, state: StateDict) -> None:
    """`model.load_state_dict(state)`, also for tensors that may not be written in place, and DTensors of whole ones."""
    own = model.state_dict(keep_vars=True)
    divided = {name: t for name, t in own.items() if isinstance(t, Tensor) and is_dtensor(t)}
    with torch.no_grad():
        for name in divided.keys() & state.keys():
            value = state[name]
            local_tensor(divided[name]).copy_(local_tensor(value) if is_dtensor(value) else cut_local(value, own[name]))
    odd = [name for name, t in own.items() if isinstance(t, Tensor) and name in state and not is_writable_in_place(t)]
    for name in (name for name in odd if name not in divided):
        if own[name].shape != state[name].shape:
            raise RuntimeError(f"size mismatch for {name}: {tuple(state[name].shape)}, not {tuple(own[name].shape)}")
        overwrite_tensor(model, own[name], state[name])
    missing, unexpected = model.load_state_dict({k: v for k, v in state.items() if k not in set(odd)}, strict=False)
    problems = [f"{name} is in the model only" for name in missing if name not in set(odd)]
    problems += [f"{name} is in the checkpoint only" for name in unexpected]
    if problems:
        raise RuntimeError(problems[0])


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


def scale_tensors(tensors: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply tensors in place, in few kernels those that are dense."""
    if dense := [tensor for tensor in tensors if not tensor.is_sparse]:
        torch._foreach_mul_(dense, factor)
    for tensor in (tensor for tensor in tensors if tensor.is_sparse):
        tensor.mul_(factor)
