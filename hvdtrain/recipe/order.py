"""The global sample order: which example ids step k consumes, whatever the number of ranks.

An epoch's order is a keyed bijection p of [0, n), computed position by position: nothing is stored or sorted, and any
part of it can be had without the rest. It is a generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002) on pairs (left, right) of [0, a) x [0, b), the smallest such rectangle with even a that
holds [0, n) and is nearly square:

    position = left + a * right
    round j:  left, right = right, (left + F_j(right)) mod (a, b, a, b, ...)[j]      F_j: keyed by seed, epoch and n
    p(position) = left + a * right, or if that is n or more, the network applied to it again ("cycle walking")

Fewer than a positions in n lie outside, so that hardly any is walked. An even a lets the rounds reach odd and even
permutations alike. F_j is splitmix64's finalizer (Steele et al., OOPSLA'14). Four rounds of independent random
functions cannot be distinguished from a random permutation with few positions (Luby and Rackoff, SIAM J. Comput.
1988), six with many (Patarin, 2010); for tiny n, whose functions have few values, more are needed: see `rounds`.

Measured against numpy's shuffle for n from 2 to 5000, 4,000 to 300,000 seeds each (tests/unit/test_order.py has the
like): frequencies of whole orders (n <= 7), of ids by position, of pairs, of differences between neighbours, the
numbers of fixed points and of ascents: all within what chance gives numpy's.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]

ORDER_VERSION = 2  # of the order; 1 sorted Philox's output, see hvdtrain.ledger.epoch_order
MAX_EXAMPLES = 1 << 62  # a and b stay below 2^32; of a stream: the length of its only epoch is not known
WHOLE_SHARE = 1024  # of the batch: what the ranks' shares add up to
BLOCK_POSITIONS = 8192  # positions computed at a time: fewer cost more each, as numpy's calls do
GOLDEN_GAMMA, MIX_MULTIPLIER, HALF_BITS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(32)


def rounds_needed(side: int) -> int:
    """Return how many rounds a network needs whose shorter side has `side` values: 48 for 2, 16 for 8, 8 from 64 on.

    What distinguishes a network from a random permutation shrinks with each two rounds by a factor of the side at
    least; this many rounds bring it below 2^-24.
    """
    return max(8, 2 * -(-24 // max(1, side.bit_length() - 1)))


class Order(Protocol):
    """The order of an epoch: which id each of its positions has."""

    @property
    def examples(self) -> int:
        """The number of positions."""

    def ids_between(self, begin: int, end: int) -> Ids:
        """Return the ids at positions [begin, end): (end - begin,) int64."""


class SampleOrder:
    """The order of an epoch of `examples` examples; it holds a few hundred bytes."""

    def __init__(self, examples: int, seed: int, epoch: int) -> None:
        """Draw the order that belongs to any two integers.

        Args:
            examples: from 1 to MAX_EXAMPLES.
            seed: of the run, any integer.
            epoch: any integer; the run's first one is 0.
        """
        if not 1 <= examples <= MAX_EXAMPLES:
            raise ValueError(f"an order of {examples} examples; expected 1 to 2^62")
        self.examples = examples
        root = math.isqrt(examples - 1) + 1
        a = root + root % 2
        b = -(-examples // a)
        key = f"hvdtrain order {ORDER_VERSION}: {examples} examples, seed {seed}, epoch {epoch}"
        drawn = hashlib.shake_128(key.encode()).digest(8 * rounds_needed(b))
        self._a, self._b = np.uint64(a), np.uint64(b)
        self._keys: Words = np.frombuffer(drawn, "<u8").astype(np.uint64)

    def ids_between(self, begin: int, end: int) -> Ids:
        """Return the ids at positions [begin, end): (end - begin,) int64."""
        if not 0 <= begin <= end <= self.examples:
            raise ValueError(f"positions {begin} to {end} of an order of {self.examples} examples")
        found = self._permute_positions(np.arange(begin, end, dtype=np.uint64))
        while len(outside := np.flatnonzero(found >= np.uint64(self.examples))):
            found[outside] = self._permute_positions(found[outside])
        return found.astype(np.int64)

    def _permute_positions(self, values: Words) -> Words:
        """Apply the network once: a permutation of [0, a * b)."""
        left: Words = values % self._a
        right: Words = values // self._a
        moduli = (self._a, self._b)
        for j, key in enumerate(self._keys):
            modulus = moduli[j % 2]
            mixed = right * GOLDEN_GAMMA + key
            mixed ^= mixed >> HALF_BITS
            mixed *= MIX_MULTIPLIER
            mixed >>= HALF_BITS
            mixed *= modulus  # 32 random bits to [0, modulus), without a division
            mixed >>= HALF_BITS
            mixed += left
            # Below twice the modulus; unsigned, it wraps to a large number if there is nothing to subtract.
            left, right = right, np.minimum(mixed, mixed - modulus)
        joined: Words = left + right * self._a
        return joined


class StreamOrder:
    """The order of an epoch of a stream: its ids count the stream's examples from `first` on."""

    def __init__(self, examples: int, first: int) -> None:
        self.examples, self._first = examples, first

    def ids_between(self, begin: int, end: int) -> Ids:
        """Return the ids at positions [begin, end): (end - begin,) int64."""
        return np.arange(self._first + begin, self._first + end)


def iterate_batches(examples: int, batch_size: int, seed: int, epoch: int, offset: int = 0) -> Iterator[Ids]:
    """Yield the global batches of a shuffled epoch; see `cut_batches`."""
    return cut_batches(SampleOrder(examples, seed, epoch), batch_size, offset)


def cut_batches(order: Order, batch_size: int, offset: int = 0) -> Iterator[Ids]:
    """Yield the global batches of an epoch from example `offset` of its order on; the last one may be smaller."""
    block = max(1, BLOCK_POSITIONS // batch_size) * batch_size
    for begin in range(offset, order.examples, block):
        ids = order.ids_between(begin, min(begin + block, order.examples))
        for start in range(0, len(ids), batch_size):
            yield ids[start : start + batch_size]


def part_bounds(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return where a rank's part of `count` examples begins and ends.

    Parts are contiguous and differ by one example at most; rank 0 is never empty where any rank is not.
    """
    return -(-count * rank // size), -(-count * (rank + 1) // size)


def share_bounds(count: int, rank: int, shares: tuple[int, ...]) -> tuple[int, int]:
    """Return where a rank's part of `count` examples, or of shards, begins and ends.

    Parts are contiguous, in proportion to the shares by largest remainder; even ones are those of `part_bounds`.

    Args:
        count: of what is dealt.
        rank: whose part it is.
        shares: of all ranks, in 1,024ths.
    """
    if is_even(shares):
        return part_bounds(count, rank, len(shares))
    starts = _find_starts(count, shares)
    return starts[rank], starts[rank + 1]


@lru_cache(maxsize=64)
def _find_starts(count: int, shares: tuple[int, ...]) -> list[int]:
    """Return where each rank's part begins, and where the last one ends."""
    return [0, *itertools.accumulate(apportion(count, shares))]


def is_even(shares: Sequence[int]) -> bool:
    """Whether shares are equal, as far as 1,024ths can be."""
    return max(shares) - min(shares) <= 1


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """Divide `count` in proportion to weights by largest remainder; of equal remainders the first ones count more."""
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    quotas = [count * weight / whole for weight in exact]
    sizes = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda place: sizes[place] - quotas[place])
    for place in by_remainder[: count - sum(sizes)]:
        sizes[place] += 1
    return sizes


def split_micro_batches(ids: Ids, most: int) -> list[Ids]:
    """Cut ids into micro-batches of at most `most`, as even as can be; none if there are no ids."""
    number = -(-len(ids) // most)
    return [ids[slice(*part_bounds(len(ids), i, number))] for i in range(number)]
