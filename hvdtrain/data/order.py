"""The global sample order: which example ids step k consumes, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def permutation(examples: int, seed: int, epoch: int) -> Ids:
    """The order of an epoch: shape (examples,), each id once.

    Sorts the raw output of Philox (Salmon et al., SC'11), a counter-based generator whose stream numpy keeps fixed,
    so that a run resumed elsewhere sees the same order.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(examples)
    return np.argsort(keys, kind="stable").astype(np.int64)


def steps(examples: int, batch_size: int, seed: int, epoch: int, offset: int = 0) -> Iterator[Ids]:
    """The global batches of an epoch from example `offset` of its order on; the last one may be ragged."""
    order = permutation(examples, seed, epoch)
    for start in range(offset, examples, batch_size):
        yield order[start : start + batch_size]


def bounds(count: int, rank: int, size: int) -> tuple[int, int]:
    """Where a rank's part of `count` examples begins and ends.

    Parts are contiguous and differ by one example at most; rank 0 is never empty where any rank is not.
    """
    return -(-count * rank // size), -(-count * (rank + 1) // size)


def chunks(ids: Ids, most: int) -> list[Ids]:
    """Cut ids into micro-batches of at most `most`, as even as can be; none where there are no ids."""
    number = -(-len(ids) // most)
    return [ids[slice(*bounds(len(ids), i, number))] for i in range(number)]
