"""Batches of one size, so that nothing is compiled again for a smaller one: padded with copies of their last example.

Copies, not zeros: what is computed of a padded row is finite if the example's is, and so its gradient times 0 is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.system.errors import RunError


def map_arrays(function: Callable[[NDArray[Any]], Any], batch: Any) -> Any:
    """Return a nested batch with each array replaced by what a function makes of it.

    Raises RunError for what is neither an array nor a container of arrays.
    """
    if isinstance(batch, torch.Tensor):
        batch = batch.numpy(force=True)
    if isinstance(batch, (np.ndarray, np.generic, int, float, complex)):
        return function(np.asarray(batch))
    if isinstance(batch, dict):
        return {key: map_arrays(function, value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [map_arrays(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: map_arrays(function, getattr(batch, field.name)) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    raise RunError(
        f"a batch holds a {type(batch).__name__}, which cannot be compiled; expected numpy arrays in dicts, tuples or "
        "lists: let collate return them"
    )


def iterate_arrays(batch: Any) -> Iterator[NDArray[Any]]:
    """Yield the arrays of a nested batch. Raises RunError: see `map_arrays`."""
    found: list[NDArray[Any]] = []
    map_arrays(found.append, batch)
    return iter(found)


def count_rows(batch: Any) -> int | None:
    """Return how many rows all arrays of a batch have; None if it is not the same number for all."""
    counts = {array.shape[0] if array.ndim else None for array in iterate_arrays(batch)}
    return counts.pop() if len(counts) == 1 else None


def describe_rows(batch: Any) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return the type and the shape of a row, of each array of a batch."""
    return [(array.dtype, array.shape[1:]) for array in iterate_arrays(batch)]


def select_rows(batch: Any, rows: NDArray[np.int64]) -> Any:
    """Return a batch of some of the rows of another: (B,) their numbers, each as often as it is named."""
    return map_arrays(lambda array: array[rows], batch)


def pad_rows(batch: Any, count: int, size: int) -> Any:
    """Return a batch of `size` rows: the `count` rows of another, and its last one as often as is needed."""
    if count == size:
        return map_arrays(lambda array: array, batch)
    return select_rows(batch, np.minimum(np.arange(size), count - 1))
