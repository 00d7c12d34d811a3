"""The global sample order and its division."""

from __future__ import annotations

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvdtrain.recipe import order
from hvdtrain.recipe.order import Ids


@given(examples=st.integers(1, 500), batch=st.integers(1, 100), seed=st.integers(0, 2**32), epoch=st.integers(0, 9))
def test_an_epoch_visits_each_example_once(examples: int, batch: int, seed: int, epoch: int) -> None:
    steps = list(order.iterate_batches(examples, batch, seed, epoch))
    assert [len(ids) for ids in steps[:-1]] == [batch] * (len(steps) - 1)
    assert sorted(np.concatenate(steps)) == list(range(examples))
    # From the middle on: what was left.
    rest = list(order.iterate_batches(examples, batch, seed, epoch, offset=min(batch, examples)))
    assert [ids.tolist() for ids in rest] == [ids.tolist() for ids in steps[1:]]


@given(count=st.integers(0, 300), size=st.integers(1, 40), most=st.integers(1, 50))
def test_parts_and_chunks_cover_a_batch_in_order(count: int, size: int, most: int) -> None:
    ids = np.arange(count)
    parts = [ids[slice(*order.part_bounds(count, rank, size))] for rank in range(size)]
    assert np.concatenate(parts).tolist() == ids.tolist()
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)
    for part in parts:
        chunks = order.split_micro_batches(part, most)
        assert [i for chunk in chunks for i in chunk] == part.tolist()
        assert all(1 <= len(chunk) <= most for chunk in chunks)
        assert len(chunks) == -(-len(part) // most)


def whole(examples: int, seed: int, epoch: int = 0) -> Ids:
    return order.SampleOrder(examples, seed, epoch).ids_between(0, examples)


def test_epochs_and_seeds_differ_and_the_order_is_for_ever() -> None:
    first = whole(10, 0).tolist()
    assert first != whole(10, 0, 1).tolist() != whole(10, 1, 1).tolist()
    # A change here breaks every run that is resumed.
    assert first == [8, 0, 7, 2, 3, 5, 6, 9, 1, 4]
    assert order.SampleOrder(10**9, 7, 3).ids_between(123_456_789, 123_456_793).tolist() == [
        137940702,
        796029093,
        579735210,
        703879725,
    ]


def by_definition(position: int, examples: int, seed: int, epoch: int) -> int:
    """An id, with Python's integers."""
    root = math.isqrt(examples - 1) + 1
    a = root if root % 2 == 0 else root + 1
    b = -(-examples // a)
    key = hashlib.shake_128(f"hvdtrain order 2: {examples} examples, seed {seed}, epoch {epoch}".encode())
    number = max(8, 2 * math.ceil(24 / max(1, math.floor(math.log2(b)))))
    drawn = key.digest(8 * number)
    while True:
        left, right = position % a, position // a
        for j in range(number):
            modulus = (a, b)[j % 2]
            mixed = (right * 0x9E3779B97F4A7C15 + int.from_bytes(drawn[8 * j : 8 * j + 8], "little")) % 2**64
            mixed = (mixed ^ mixed >> 32) * 0xBF58476D1CE4E5B9 % 2**64 >> 32
            left, right = right, (left + (mixed * modulus >> 32)) % modulus
        position = left + a * right
        if position < examples:
            return position


@given(data=st.data(), examples=st.integers(1, 2**62), seed=st.integers(), epoch=st.integers(0, 99))
def test_the_order_is_as_defined(data: st.DataObject, examples: int, seed: int, epoch: int) -> None:
    position = data.draw(st.integers(0, examples - 1))
    expected = by_definition(position, examples, seed, epoch)
    assert order.SampleOrder(examples, seed, epoch).ids_between(position, position + 1).tolist() == [expected]


def test_no_two_seeds_share_an_order() -> None:
    seeds = [-1, 0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64]
    assert len({tuple(whole(50, seed, epoch)) for seed in seeds for epoch in (0, 1)}) == 2 * len(seeds)


@settings(deadline=None, max_examples=60)
@given(examples=st.integers(1, 10**6), seed=st.integers(), epoch=st.integers())
def test_every_id_comes_once(examples: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(whole(examples, seed, epoch)), np.arange(examples))


def test_every_id_comes_once_for_each_small_number_of_examples() -> None:
    for examples in range(1, 600):
        assert np.array_equal(np.sort(whole(examples, 5)), np.arange(examples)), examples


@given(data=st.data(), examples=st.integers(1, 3000))
def test_a_part_of_the_order_is_the_same_without_the_rest(data: st.DataObject, examples: int) -> None:
    begin = data.draw(st.integers(0, examples))
    end = data.draw(st.integers(begin, examples))
    assert order.SampleOrder(examples, 1, 0).ids_between(begin, end).tolist() == whole(examples, 1)[begin:end].tolist()


def test_positions_that_are_not_there_are_refused() -> None:
    for begin, end in ((-1, 2), (3, 2), (0, 11)):
        with pytest.raises(ValueError, match="positions"):
            order.SampleOrder(10, 0, 0).ids_between(begin, end)
    with pytest.raises(ValueError, match="0 examples"):
        order.SampleOrder(0, 0, 0)


def test_a_billion_examples_need_no_memory() -> None:
    whole(100, 0)
    tracemalloc.start()
    first = next(order.iterate_batches(10**9, 128, 0, 0))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert len(first) == 128
    assert first.min() >= 0
    assert first.max() < 10**9
    huge = order.SampleOrder(order.MAX_EXAMPLES, 0, 0).ids_between(order.MAX_EXAMPLES - 5, order.MAX_EXAMPLES)
    assert 0 <= huge.min() <= huge.max() < order.MAX_EXAMPLES


# What follows are frequencies over seeds against what chance gives. The seeds are fixed: no test fails by chance.


def orders(examples: int, seeds: int) -> Ids:
    """(seeds, examples)"""
    return np.stack([whole(examples, seed) for seed in range(seeds)])


def probability(counts: NDArray[np.int64], expected: float) -> float:
    """How often chance gives counts that are at least as uneven (chi-square, by its normal approximation)."""
    freedom = counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("examples", [2, 3, 5])
def test_each_order_of_few_examples_is_as_frequent(examples: int) -> None:
    codes = (orders(examples, 3000) * examples ** np.arange(examples)).sum(1)
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == math.factorial(examples)
    assert probability(counts, 3000 / len(counts)) > 1e-3


@pytest.mark.parametrize("examples", [6, 9, 17, 64])
def test_ids_pairs_and_neighbours_are_as_frequent_at_each_position(examples: int) -> None:
    seeds = 2500
    drawn = orders(examples, seeds)
    for position in (0, examples // 2, examples - 1):
        assert probability(np.bincount(drawn[:, position], minlength=examples), seeds / examples) > 1e-3, position
    apart = ~np.eye(examples, dtype=bool)
    for one, other in ((0, 1), (0, examples - 1), (examples // 2, examples // 2 + 1)):
        pairs = np.bincount(drawn[:, one] * examples + drawn[:, other], minlength=examples**2)
        counts = pairs.reshape(examples, examples)[apart]
        assert probability(counts, seeds / counts.size) > 1e-3, (one, other)
    # Of all neighbours: which differences come how often.
    steps = np.bincount(np.diff(drawn, axis=1).ravel() + examples, minlength=2 * examples)[1:]
    difference = np.arange(1 - examples, examples)
    expected = np.where(difference != 0, seeds * (examples - abs(difference)) / examples, 1)
    steps[examples - 1] = 1  # none is 0
    assert abs((steps - expected) / np.sqrt(expected)).max() < 5


def test_neighbours_in_a_long_order_are_not_correlated() -> None:
    """Against a random permutation's moments: serial correlation at several lags, ascents, ids near their place."""
    examples = 200_000
    for seed in range(5):
        drawn = whole(examples, seed)
        centred = (drawn - drawn.mean()) / drawn.std()
        for lag in (1, 2, 3, 128, 447, 448, 449):  # 448 is a side of the network
            assert abs(float((centred[:-lag] * centred[lag:]).mean())) < 5 / math.sqrt(examples), lag
        ascents = int((np.diff(drawn) > 0).sum())
        assert abs(ascents - (examples - 1) / 2) < 5 * math.sqrt(examples / 12)
        assert int((abs(drawn - np.arange(examples)) <= 50).sum()) < 101 + 5 * math.sqrt(101)
        # The first tenth of an epoch holds about a tenth of each hundredth of the ids.
        counts = np.bincount(drawn[: examples // 10] * 100 // examples, minlength=100)
        assert abs(counts - 200).max() < 5 * math.sqrt(200)
