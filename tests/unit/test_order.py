"""The global sample order and its division."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.data import order


@given(examples=st.integers(1, 500), batch=st.integers(1, 100), seed=st.integers(0, 2**32), epoch=st.integers(0, 9))
def test_an_epoch_visits_each_example_once(examples: int, batch: int, seed: int, epoch: int) -> None:
    steps = list(order.steps(examples, batch, seed, epoch))
    assert [len(ids) for ids in steps[:-1]] == [batch] * (len(steps) - 1)
    assert sorted(np.concatenate(steps)) == list(range(examples))
    # From the middle on: what was left.
    rest = list(order.steps(examples, batch, seed, epoch, offset=min(batch, examples)))
    assert [ids.tolist() for ids in rest] == [ids.tolist() for ids in steps[1:]]


@given(count=st.integers(0, 300), size=st.integers(1, 40), most=st.integers(1, 50))
def test_parts_and_chunks_cover_a_batch_in_order(count: int, size: int, most: int) -> None:
    ids = np.arange(count)
    parts = [ids[slice(*order.bounds(count, rank, size))] for rank in range(size)]
    assert np.concatenate(parts).tolist() == ids.tolist()
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)
    for part in parts:
        chunks = order.chunks(part, most)
        assert [i for chunk in chunks for i in chunk] == part.tolist()
        assert all(1 <= len(chunk) <= most for chunk in chunks)
        assert len(chunks) == -(-len(part) // most)


def test_epochs_and_seeds_differ_and_the_order_is_for_ever() -> None:
    first = order.permutation(10, 0, 0).tolist()
    assert first != order.permutation(10, 0, 1).tolist() != order.permutation(10, 1, 1).tolist()
    # A change here breaks every run that is resumed.
    assert first == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_no_two_seeds_share_an_order() -> None:
    seeds = [0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
    assert len({tuple(order.permutation(50, seed, epoch)) for seed in seeds for epoch in (0, 1)}) == 2 * len(seeds)
