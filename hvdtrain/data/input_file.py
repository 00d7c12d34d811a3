"""A file of examples to predict: .npy, .npz or .jsonl, read as a dataset.

.npy     example i is row i of the array
.npz     arrays of one length: saved by name (x=..., y=...) a dict of rows, by position a tuple of rows, or one row
.jsonl   a JSON value a line; lists of numbers become arrays, of int64 or float32
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.system.errors import UserError

INPUT_SUFFIXES = (".npy", ".npz", ".jsonl")


class InputFile:
    """The examples of a file.

    Attributes:
        path: the file.
        num_bytes: its size, by which ranks compare that they have read the same.
    """

    def __init__(self, path: Path) -> None:
        """Read a file. Raises UserError if it cannot be read, has no example, or its arrays differ in length."""
        self.path = path
        if path.suffix not in INPUT_SUFFIXES:
            raise UserError(f"--input {path}: expected a file whose name ends in {', '.join(INPUT_SUFFIXES)}")
        try:
            self.num_bytes = path.stat().st_size
            self._examples = self._read_lines() if path.suffix == ".jsonl" else self._read_arrays()
        except OSError as error:
            raise UserError(f"--input {path} cannot be read: {error.strerror or error}") from error
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"--input {path} cannot be read: {error}") from error
        if not len(self):
            raise UserError(f"--input {path} has no examples")

    def _read_lines(self) -> list[Any]:
        examples = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                examples.append(_to_arrays(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
        return examples

    def _read_arrays(self) -> dict[str, NDArray[Any]]:
        loaded = np.load(self.path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if self.path.suffix == ".npz" else {"arr_0": loaded}
        lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} has {length} rows" for name, length in lengths.items())
            raise ValueError(f"{shown}; expected arrays of one length")
        return arrays

    def __len__(self) -> int:
        if isinstance(self._examples, list):
            return len(self._examples)
        return next((len(array) if array.ndim else 0 for array in self._examples.values()), 0)

    def __getitem__(self, i: int) -> Any:
        if isinstance(self._examples, list):
            return self._examples[i]
        rows = {name: array[i] for name, array in self._examples.items()}
        if list(rows) != [f"arr_{place}" for place in range(len(rows))]:
            return rows
        return rows["arr_0"] if len(rows) == 1 else tuple(rows.values())


def _to_arrays(value: Any) -> Any:
    """Return a JSON value with its rectangular lists of numbers as arrays."""
    if isinstance(value, dict):
        return {key: _to_arrays(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return np.float32(value)
    if not isinstance(value, list):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # of different lengths: `collate` has to know what to do
        return value
    if array.dtype.kind not in "iufb" or not array.size:
        return value
    return array.astype(np.float32) if array.dtype.kind == "f" else array
