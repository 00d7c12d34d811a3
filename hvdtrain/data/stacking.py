"""The default batches of frameworks that take numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = "biufc"  # of numpy's own numbers; those of ml_dtypes, such as bfloat16, count as numbers too


def stack_examples(examples: Sequence[Any]) -> Any:
    """Return examples as one batch: arrays (...) of each as an array (B, ...), numbers as an array (B,).

    Tuples, named tuples, lists and dicts are joined part by part, and stay what they are. Arrays keep their type, as do
    numpy's numbers; Python's become bool, int64 and float32. What has `__array__` is an array, such as a torch tensor.
    Texts become a list.

    Args:
        examples: (B,) one at least, all of the same structure.

    Raises:
        TypeError: for an object of another kind.
        ValueError: examples differ in structure or in shape.
    """
    return _stack_parts(examples, "")


def _stack_parts(parts: Sequence[Any], path: str) -> Any:
    """Return the batch of one part of each example. path: of the part in an example, "" for the whole of it."""
    first = parts[0]
    kinds = (Mapping, tuple, list, (str, bytes), object)
    kind = next(kind for kind in kinds if isinstance(first, kind))
    if any(next(kind for kind in kinds if isinstance(part, kind)) is not kind for part in parts):
        raise ValueError(f"{_name_part(path)} is of different types: {_join_different(_name_type(p) for p in parts)}")
    if kind is Mapping:
        if any(part.keys() != first.keys() for part in parts):
            raise ValueError(f"{_name_part(path)} has different keys: {_join_different(str([*p]) for p in parts)}")
        return {key: _stack_parts([part[key] for part in parts], f"{path}[{key!r}]") for key in first}
    if kind in (tuple, list):
        if any(len(part) != len(first) for part in parts):
            raise ValueError(f"{_name_part(path)} has different lengths: {_join_different(str(len(p)) for p in parts)}")
        joined = [_stack_parts(column, f"{path}[{i}]") for i, column in enumerate(zip(*parts, strict=True))]
        if kind is list:
            return joined
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    return list(parts) if kind is not object else _stack_arrays(parts, path)


def _stack_arrays(values: Sequence[Any], path: str) -> NDArray[Any]:
    if all(type(value) in (bool, int, float) for value in values):
        number = max((type(value) for value in values), key=(bool, int, float).index)
        return np.array(values, {bool: np.bool_, int: np.int64, float: np.float32}[number])
    arrays = []
    for value in values:
        array = np.asarray(value) if hasattr(value, "__array__") or isinstance(value, (bool, int, float)) else None
        if array is None or not (array.dtype.kind in KINDS or array.dtype.isbuiltin == 2):
            what = _name_type(value) + (f" of {array.dtype}" if array is not None else "")
            raise TypeError(f"{_name_part(path)} is of type {what}; expected an array or a number")
        arrays.append(array)
    if any(array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"{_name_part(path)} has different shapes: {_join_different(str(a.shape) for a in arrays)}")
    return np.stack(arrays)


def _name_part(path: str) -> str:
    return f"part {path}" if path else "the example"


def _name_type(value: object) -> str:
    return type(value).__name__


def _join_different(texts: Any) -> str:
    """Return the first two texts that differ."""
    return " and ".join([*dict.fromkeys(texts)][:2])
