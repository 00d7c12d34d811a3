"""The same arrays on all ranks: parameters and the state of an optimizer, in loops of one's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from hvdtrain.bridge.functions import Array
from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import check_agreement
from hvdtrain.jax.leaves import ARRAYS, SCALARS, flatten_tree, make_consistent_part

CALL = "broadcast()"


def broadcast(tree: Any, root: int = 0, process_set: collectives.Group = None) -> Any:
    """Return a tree with the root's values: new arrays of the same types, on the devices on which this rank has them.

    Call it outside of jit, on all ranks alike, with the parameters and the optimizer's state before the first step.

    Args:
        tree: a pytree of jax.Arrays, random keys among them, numpy arrays, of any type, and numbers.
        root: a rank among all, even if a process_set is given; it must be in it.
        process_set: the ranks that take part; None: all.

    Raises:
        UserError: it is called within jit, for a leaf that is no array, and on all ranks if their trees differ.
    """
    leaves, arrays, structure = flatten_tree(tree, CALL, (*ARRAYS, *SCALARS))
    check_agreement("jax.broadcast.agreement", [make_consistent_part(CALL, leaves)], process_set)
    values = [read_values(array) for array in arrays]
    sizes = [value.nbytes for value in values]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    pieces = [piece.numpy() for piece in torch.split(flat, sizes)] if leaves else []
    if collectives.rank() == root:
        for piece, value in zip(pieces, values, strict=True):
            piece[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    if len(flat):
        collectives.broadcast_(flat, "jax.broadcast", root, process_set)
    copies = [piece.copy().view(value.dtype).reshape(value.shape) for piece, value in zip(pieces, values, strict=True)]
    return jax.tree.unflatten(structure, [make_array(*pair) for pair in zip(copies, arrays, strict=True)])


def read_values(array: Array) -> np.ndarray[Any, Any]:
    """Return an array's values as numpy has them; of random keys, the numbers that they are made of."""
    return np.asarray(jax.random.key_data(array) if is_random_key(array) else array)


def make_array(values: np.ndarray[Any, Any], like: Array) -> Array:
    """Return an array of these values, which nobody else has, of the kind of another and where that is."""
    if not isinstance(like, jax.Array):
        return values.item() if isinstance(like, SCALARS) else values
    if is_random_key(like):
        key = jax.random.wrap_key_data(jnp.asarray(values), impl=jax.random.key_impl(like))
        return jax.device_put(key, like.sharding)
    # On a device by choice, as gradients are: otherwise jitted functions are compiled twice.
    return jax.device_put(values, like.sharding)


def is_random_key(array: Array) -> bool:
    """Return whether an array is one of typed random keys."""
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
