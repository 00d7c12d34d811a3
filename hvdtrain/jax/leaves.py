"""The arrays of a tree, JAX's and numpy's, as torch tensors that share their memory, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from hvdtrain.bridge.functions import Array
from hvdtrain.comm.agreement import ConsistentPart
from hvdtrain.jax.functions import join_path
from hvdtrain.system.errors import UserError

ARRAYS = (jax.Array, np.ndarray, np.generic)
SCALARS = (bool, int, float, complex)  # a step's number, say, in the state of a training
BFLOAT16 = np.dtype(jnp.bfloat16)  # of numpy by ml_dtypes; torch does not take it from numpy


@dataclass(frozen=True)
class Leaf:
    """What has to be the same of an array on all ranks."""

    name: str  # the keys that lead to it, joined by dots
    shape: tuple[int, ...]
    dtype: str  # "bfloat16"
    is_numpy: bool

    def describe(self) -> str:
        """Return its name, type and shape."""
        return f"{self.name!r} {self.dtype} {self.shape}"


def flatten_tree(tree: Any, call: str, accepted: tuple[type, ...] = ARRAYS) -> tuple[list[Leaf], list[Array], Any]:
    """Return the leaves of a tree, its arrays and its structure.

    Args:
        tree: of jax.Arrays that are on one device each, and numpy arrays.
        call: the function that was given it, for messages.
        accepted: the types of leaves.

    Raises:
        UserError: for anything else, which is named.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [join_path("", path) for path, _ in named]
    if len(set(names)) < len(names):  # {"a.b": ...} next to {"a": {"b": ...}}
        names = [jax.tree_util.keystr(path) for path, _ in named]
    arrays = [array for _, array in named]
    for name, array in zip(names, arrays, strict=True):
        check_array(name, array, call, accepted)
    leaves = []
    for name, array in zip(names, arrays, strict=True):
        dtype = getattr(array, "dtype", type(array).__name__)
        leaves.append(Leaf(name, np.shape(array), str(dtype), not isinstance(array, jax.Array)))
    return leaves, arrays, structure


def check_array(name: str, array: object, call: str, accepted: tuple[type, ...]) -> None:
    """Raise UserError unless a leaf is an array on one device."""
    if isinstance(array, jax.core.Tracer):
        raise UserError(
            f"{call} was called within jit, grad or another transformation of JAX, where {name!r} has no values yet; "
            "call it outside, on what the compiled function returns"
        )
    if not isinstance(array, accepted):
        raise UserError(
            f"{call}: {name!r} is a {type(array).__name__}; expected arrays only (equinox: "
            "eqx.partition(model, eqx.is_array))"
        )
    if isinstance(array, jax.Array) and len(array.devices()) > 1:
        raise UserError(
            f"{call}: {name!r} is spread over {len(array.devices())} devices; expected one device for each rank"
        )


def export_array(array: Array) -> torch.Tensor:
    """Return an array as a torch tensor that shares its memory, and must not be written."""
    if isinstance(array, jax.Array):
        tensor: torch.Tensor = from_dlpack(array)
        return tensor
    array = np.asarray(array)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.array(array, array.dtype.newbyteorder("="))  # torch takes no others
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def copy_to_numpy(tensor: torch.Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """Return a copy of a tensor as a numpy array of that type."""
    copied = tensor.detach().to("cpu", copy=True)
    if dtype == BFLOAT16.name:
        return copied.view(torch.int16).numpy().view(BFLOAT16)
    found: np.ndarray[Any, Any] = copied.numpy()
    return found


def make_consistent_part(call: str, leaves: Sequence[Leaf], **given: object) -> ConsistentPart:
    """Return what has to be the same on all ranks that call a function with a tree, and with what else is given."""
    values = {f"array {place}": leaf.describe() for place, leaf in enumerate(leaves, 1)}
    values |= {key: str(value) for key, value in given.items()}
    return ConsistentPart("tree", values, f"{{who}}: {call}: {{key}} is {{here}}, {{base}} has {{there}}")
