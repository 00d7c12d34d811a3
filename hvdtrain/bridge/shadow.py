"""A model of another framework as torch sees it: parameters and buffers that share memory with its arrays.

Who owns the memory of a parameter, and who writes it:

    made, deep-copied, about to be loaded    torch's own; broadcasts, checkpoints and averages write it
    after an update                          the other framework's, which never changes an array: torch only reads it

Buffers are always torch's own memory, and the other framework gets copies: they are written while it may still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.bridge.functions import Array, Arrays, Backend
from hvdtrain.system.errors import UserError
from hvdtrain.torch.tensors import TensorVersion, read_version


class ImportedArrays:
    """Arrays of tensors, imported again only if a tensor was written or has other memory."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[TensorVersion, Array]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ImportedArrays:
        return ImportedArrays()

    def read(self, name: str, tensor: Tensor, backend: Backend, *, copy: bool) -> Array:
        """Return the array of a tensor. copy: of a copy of the tensor, which may be written meanwhile."""
        version = read_version(tensor)
        found = self._found.get(name)
        if found is None or found[0] != version:
            detached = tensor.detach()
            found = version, backend.import_tensor(detached.clone() if copy else detached)
            self._found[name] = found
        return found[1]

    def set(self, name: str, tensor: Tensor, array: Array) -> None:
        """Note that a tensor shares its memory with an array."""
        self._found[name] = read_version(tensor), array


class Collection(nn.Module):
    """Parameters and buffers by name, which may be names that torch's modules use themselves."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module of a name; not what torch's modules have by it."""
        module: Any = self
        for part in target.split(".") if target else ():
            module = module._modules[part]
        return module  # type: ignore[no-any-return]


class Shadow(Collection):
    """Parameters and buffers by name, in nested modules: "dense.kernel" is `kernel` of the module `dense`.

    Attributes:
        backend: shares the memory.
        param_by_name, buffer_by_name: in the order in which they were given.
    """

    def __init__(self, backend: Backend, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Take tensors over, whose memory nobody else writes.

        Raises UserError if a parameter cannot be trained, or two names are in each other's way.
        """
        super().__init__()
        self.backend = backend
        self._arrays = ImportedArrays()
        for name, tensor in params.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise UserError(
                    f"the parameter {name!r} is {str(tensor.dtype).removeprefix('torch.')}, which has no gradient; "
                    "expected numbers with a fraction: put it into another collection of the model, or on self"
                )
            owner, key = self._enter_module(name)
            owner._parameters[key] = nn.Parameter(tensor)
        for name, tensor in buffers.items():
            owner, key = self._enter_module(name)
            owner._buffers[key] = tensor
        self.param_by_name: dict[str, nn.Parameter] = {}
        self.buffer_by_name: dict[str, Tensor] = {}
        self._index_names(params, buffers)

    def _enter_module(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that holds a name, made if need be, and the name's last part."""
        *path, key = name.split(".")
        module: nn.Module = self
        for part in path:
            # Not by add_module, which refuses names that torch's modules use themselves.
            child = module._modules.setdefault(part, Collection())
            assert child is not None
            module = child
        if key in module._parameters or key in module._buffers or key in module._modules:
            raise UserError(f"the model has {name!r} twice, as an array and as a part of other names: rename one")
        return module, key

    def _index_names(self, params: Iterable[str], buffers: Iterable[str]) -> None:
        own_params, own_buffers = dict(self.named_parameters()), dict(self.named_buffers())
        self.param_by_name = {name: own_params[name] for name in params}
        self.buffer_by_name = {name: own_buffers[name] for name in buffers}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shadow:
        copied = Shadow.__new__(Shadow)
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        copied.training, copied.backend, copied._arrays = self.training, self.backend, ImportedArrays()
        for name, p in self.param_by_name.items():
            owner, key = copied._enter_module(name)
            if id(p) not in memo:
                memo[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            owner._parameters[key] = memo[id(p)]
        for name, b in self.buffer_by_name.items():
            owner, key = copied._enter_module(name)
            owner._buffers[key] = b.detach().clone()
            memo[id(b)] = owner._buffers[key]
        copied._index_names(self.param_by_name, self.buffer_by_name)
        for own, new in zip(self.modules(), copied.modules(), strict=True):
            new.training = own.training
        return copied

    def read_params(self) -> Arrays:
        """Return the parameters as arrays, by name, which share their memory."""
        return {name: self._arrays.read(name, p, self.backend, copy=False) for name, p in self.param_by_name.items()}

    def read_buffers(self) -> Arrays:
        """Return copies of the buffers as arrays, by name."""
        return {name: self._arrays.read(name, b, self.backend, copy=True) for name, b in self.buffer_by_name.items()}

    def set_params(self, arrays: Arrays) -> None:
        """Let parameters share the memory of new arrays, by name."""
        for name, array in arrays.items():
            p = self.param_by_name[name]
            p.data = self.backend.export_array(array)
            self._arrays.set(name, p, array)

    @torch.no_grad()
    def write_buffers(self, arrays: Arrays) -> None:
        """Copy new values into the buffers, by name."""
        for name, array in arrays.items():
            self.buffer_by_name[name].copy_(self.backend.export_array(array))

    def own_memory(self) -> None:
        """Give parameters memory of torch's own, which may be written."""
        for p in self.param_by_name.values():
            p.data = p.detach().clone()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load values, in memory of torch's own."""
        self.own_memory()
        return super().load_state_dict(*args, **kwargs)
