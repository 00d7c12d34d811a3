"""Arrays that fit into memory as a map-style dataset."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvdtrain.system.errors import UserError


class Arrays:
    """Examples that are the items of arrays: a dataset with len() and [i].

        Arrays(images, labels)           # example i is (images[i], labels[i])
        Arrays(image=images, label=y)    # {"image": images[i], "label": y[i]}
        Arrays(x)                        # x[i]

    Arrays are those of numpy, memory-mapped ones too, or whatever else has `shape` and [i], such as a torch tensor;
    lists become numpy arrays. Items are not copied: what changes an example in place changes the array.
    """

    def __init__(self, *arrays: Any, **named: Any) -> None:
        """Take arrays (N, ...), in their order or by name.

        Raises:
            UserError: there is none, or both kinds; or they have different numbers of examples.
        """
        if bool(arrays) == bool(named):
            raise UserError("expected arrays either in order or by name: Arrays(x, y), or Arrays(image=x, label=y)")
        given = named or {f"array {i}": array for i, array in enumerate(arrays)}
        self._arrays = {name: one if hasattr(one, "shape") else np.asarray(one) for name, one in given.items()}
        self._is_named, self._lengths = bool(named), {}
        for name, array in self._arrays.items():
            if len(array.shape) == 0:
                raise UserError(f"Arrays: {name} is a single value; expected an array (N, ...)")
            self._lengths[name] = int(array.shape[0])
        first = next(iter(self._lengths))
        for name, length in self._lengths.items():
            if length != self._lengths[first]:
                raise UserError(
                    f"Arrays: {name} has {length} examples, {first} {self._lengths[first]}; expected equally many"
                )

    def __len__(self) -> int:
        return next(iter(self._lengths.values()))

    def __getitem__(self, i: int) -> Any:
        """Return example i: an item of the only array, a tuple of items, or a dict of them."""
        example = {name: array[i] for name, array in self._arrays.items()}
        if self._is_named:
            return example
        return next(iter(example.values())) if len(example) == 1 else tuple(example.values())
