"""Ranges of positions, against sets of positions."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.recipe.order import SampleOrder
from hvdtrain.recipe.ranges import (
    Ranges,
    count_positions,
    join_ranges,
    list_ids,
    slice_ranges,
    subtract_ranges,
)

POSITIONS = st.sets(st.integers(0, 30))


def to_ranges(positions: set[int]) -> Ranges:
    return join_ranges([[place, place + 1] for place in positions])


def to_set(ranges: Ranges) -> set[int]:
    assert all(begin < end for begin, end in ranges)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ranges)), ranges
    return {place for begin, end in ranges for place in range(begin, end)}


@given(POSITIONS, POSITIONS)
def test_ranges_are_sets_of_positions(one: set[int], other: set[int]) -> None:
    first, second = to_ranges(one), to_ranges(other)
    assert to_set(first) == one
    assert to_set(join_ranges(first, second)) == one | other
    assert to_set(subtract_ranges(first, second)) == one - other
    assert count_positions(first) == len(one)


@given(POSITIONS, st.integers(-3, 35), st.integers(-3, 35))
def test_slices_are_those_of_the_sorted_positions(positions: set[int], first: int, last: int) -> None:
    first, last = max(first, 0), max(last, 0)
    assert to_set(slice_ranges(to_ranges(positions), first, last)) == set(sorted(positions)[first:last])


def test_arguments_are_not_changed() -> None:
    one, other = [[0, 4]], [[2, 6]]
    join_ranges(one, other)
    subtract_ranges(one, other)
    assert (one, other) == ([[0, 4]], [[2, 6]])


def test_ids_are_those_of_the_order() -> None:
    order = SampleOrder(20, 0, 0)
    assert list_ids(order, [[2, 5], [9, 10]]).tolist() == order.ids_between(0, 20)[np.array([2, 3, 4, 9])].tolist()
