"""The orders of ids that a ledger's rows are ranges of, of this and of earlier versions, with sums of their hashes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hvdtrain.ledger.rows import hash_ids
from hvdtrain.recipe.given_order import GivenOrder
from hvdtrain.recipe.order import BLOCK_POSITIONS, Ids, SampleOrder


@dataclass(frozen=True)
class EpochOrder:
    """An epoch's order, by the version of hvdtrain.recipe.order that the run drew it with."""

    examples: int
    seed: int
    epoch: int  # from 1
    version: int
    key: str = ""  # of what the recipe's sampler gave; "": the epoch was shuffled
    given: GivenOrder | None = field(default=None, compare=False, repr=False)

    def sum_hashes(self, begin: int, end: int) -> int:
        """Return the sum of the hashes of the ids at positions [begin, end)."""
        total = 0
        for number in range(begin // BLOCK_POSITIONS, -(-end // BLOCK_POSITIONS)):
            sums, first = _block_hash_sums(self, number), number * BLOCK_POSITIONS
            total += int(sums[min(end - first, BLOCK_POSITIONS)] - sums[max(begin - first, 0)])
        return total

    def materialize(self) -> MaterializedOrder:
        """Return all of it in memory: needed only for a ledger with a defect."""
        return _materialize_order(self)

    def ids(self, begin: int, end: int) -> Ids:
        """Return the ids at positions [begin, end), (end - begin,) int64."""
        if self.given is not None:
            return _list_given(self)[begin:end]
        return _draw_order(self).ids_between(begin, end) if self.version > 1 else _sorted_philox(self)[begin:end]


class MaterializedOrder(NamedTuple):
    """An epoch's order, its hashes and their sums."""

    ids: Ids  # (examples,)
    hashes: Ids  # (examples,): of these ids
    hash_sums_before: Ids  # (examples + 1,): at each position, the sum of all hashes before it


@lru_cache(maxsize=2)
def _list_given(order: EpochOrder) -> Ids:
    assert order.given is not None
    return order.given.list_ids(order.seed, order.epoch - 1)


@lru_cache(maxsize=4)
def _draw_order(order: EpochOrder) -> SampleOrder:
    return SampleOrder(order.examples, order.seed, order.epoch - 1)


@lru_cache(maxsize=2)
def _sorted_philox(order: EpochOrder) -> Ids:
    """Return the order of version 1, (examples,) int64: Philox's output (Salmon et al., SC'11), sorted."""
    key = np.array([order.seed, order.epoch - 1], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(order.examples), kind="stable").astype(np.int64)


@lru_cache(maxsize=16)
def _block_hash_sums(order: EpochOrder, number: int) -> Ids:
    """Return, (BLOCK_POSITIONS + 1,) int64 at most, the sums of a block's hashes before each of its positions."""
    ids = order.ids(number * BLOCK_POSITIONS, min((number + 1) * BLOCK_POSITIONS, order.examples))
    return np.concatenate([[0], np.cumsum(hash_ids(ids).astype(np.int64))])


@lru_cache(maxsize=2)
def _materialize_order(order: EpochOrder) -> MaterializedOrder:
    ids = order.ids(0, order.examples)
    drawn = hash_ids(ids).astype(np.int64)
    return MaterializedOrder(ids, drawn, np.concatenate([[0], np.cumsum(drawn)]))
