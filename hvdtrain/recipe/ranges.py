"""Ranges of positions in an epoch's order: sorted, disjoint (begin, end) pairs, as `[[128, 192], [300, 310]]`.

Lists of lists, because they travel, and are saved, as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from hvdtrain.recipe.order import Ids, Order

Ranges: TypeAlias = list[list[int]]


def join_ranges(*several: Ranges) -> Ranges:
    """Return the positions that any of these have."""
    joined: Ranges = []
    for begin, end in sorted(pair for ranges in several for pair in ranges if pair[0] < pair[1]):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined


def subtract_ranges(ranges: Ranges, others: Ranges) -> Ranges:
    """Return the positions of `ranges` that `others` do not have."""
    left: Ranges = []
    for begin, end in ranges:
        for first, last in others:
            if last > begin and first < end:
                left += [[begin, first]] if begin < first else []
                begin = last
        left += [[begin, end]] if begin < end else []
    return left


def count_positions(ranges: Iterable[list[int]]) -> int:
    """Return how many positions ranges have."""
    return sum(end - begin for begin, end in ranges)


def slice_ranges(ranges: Ranges, first: int, last: int) -> Ranges:
    """Return the positions from the `first`-th on and before the `last`-th, counted from 0."""
    found: Ranges = []
    for begin, end in ranges:
        count = end - begin
        part = [begin + max(first, 0), begin + min(last, count)]
        found += [part] if part[0] < part[1] else []
        first, last = first - count, last - count
    return found


def list_ids(order: Order, ranges: Ranges) -> Ids:
    """Return the ids at some positions of an order: (count_positions(ranges),) int64."""
    return np.concatenate([order.ids_between(begin, end) for begin, end in ranges])
