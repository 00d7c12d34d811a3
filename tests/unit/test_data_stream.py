"""hvdtrain.data.Stream and Rollouts, without a training."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.data import Rollouts, Stream
from hvdtrain.recipe.framework import DataSource
from hvdtrain.recipe.order import MAX_EXAMPLES, StreamOrder, share_bounds
from hvdtrain.recipe.shares import make_shares
from hvdtrain.system.errors import UserError
from hvdtrain.training.plan import iterate_step_shares
from hvdtrain.training.position import Position
from hvdtrain.training.streams import check_division, count_own_examples, number_own_examples


def read(stream: Stream, first: int, count: int) -> list[Any]:
    return stream.read_examples(first, count, lambda number: None)


def test_a_whole_stream_is_read_from_any_example_on() -> None:
    stream = Stream(itertools.count)
    assert not stream.is_divided
    assert read(stream, 0, 3) == [0, 1, 2]
    assert read(stream, 5, 2) == [5, 6]
    assert read(stream, 1, 1) == [1]


def test_a_stream_that_ends_is_begun_again() -> None:
    assert read(Stream(lambda: "abc"), 2, 5) == ["c", "a", "b", "c", "a"]
    with pytest.raises(UserError, match="a Stream has ended after 0 examples, and is empty when it is begun again"):
        read(Stream(lambda: ""), 0, 1)
    part = Stream(lambda rank, size, offset: range(offset, 4))
    with pytest.raises(UserError, match=r"after 4 examples, .* again by its factory with offset=4: that counts the"):
        read(part, 0, 5)


def test_a_part_begins_at_its_offset() -> None:
    calls: list[tuple[int, ...]] = []

    def numbers(rank: int, size: int, offset: int) -> Iterator[int]:
        calls.append((rank, size, offset))
        return itertools.count(rank + size * offset, size)

    stream = Stream(numbers)
    stream.assign_part(1, 3)
    assert read(stream, 4, 2) == [13, 16]
    assert read(stream, 6, 1) == [19]
    assert calls == [(1, 3, 4)]
    parts = Stream(lambda rank, size: itertools.count(rank, size))
    parts.assign_part(1, 3)
    assert read(parts, 4, 2) == [13, 16]


def test_each_example_is_prepared_also_if_it_is_passed_over() -> None:
    numbers: list[int] = []
    Stream(itertools.count).read_examples(2, 2, numbers.append)
    assert numbers == [0, 1, 2, 3]


def test_another_process_reads_for_itself() -> None:
    stream = Stream(itertools.count, 10)
    read(stream, 0, 5)
    copy = pickle.loads(pickle.dumps(stream))  # noqa: S301 its own
    assert read(copy, 5, 1) == [5]
    assert read(stream, 5, 1) == [5]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Stream(iter([1])), "expected a function that returns a new iterable"),  # type: ignore[arg-type]
        (lambda: Stream(lambda rank: []), "a Stream's factory takes rank; expected no parameters, (rank, size) or"),
        (lambda: Stream(list, 0), "examples_per_epoch=0): expected 1 at least"),
        (lambda: Rollouts(lambda now, i: i, 0), "examples_per_epoch=0): expected 1 at least"),
    ],
)
def test_what_is_no_stream_is_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    assert text in str(refused.value)


def test_a_factory_must_not_return_a_used_iterator() -> None:
    used = iter(range(10))
    stream = Stream(lambda: used)
    read(stream, 0, 2)
    with pytest.raises(UserError, match="returned the same iterator again"):
        read(stream, 0, 2)


@given(st.integers(1, 30), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 12))
def test_each_rank_knows_how_much_of_its_part_it_has_read(
    examples: int, batch: int, weights: list[int], steps: int
) -> None:
    ranks, shares = len(weights), make_shares(weights)
    plan: Any = SimpleNamespace(examples=examples, batch_size=batch, ranks=ranks, shares=shares, micro_batch=2)
    plan.find_shard_bounds = lambda count, rank: [share_bounds(count, rank, shares)]
    position, read = Position(examples=examples), [0] * ranks
    for _ in range(steps):
        assert [count_own_examples(plan, position, rank) for rank in range(ranks)] == read
        size = min(batch, examples - position.offset)
        for rank in range(ranks):
            share = next(iterate_step_shares(plan, StreamOrder(examples, 0), position.offset, rank))
            (numbered,) = number_own_examples(iter([share]), read[rank])
            own = [int(i) for shard in numbered.shards for ids in shard for i in ids]
            assert own == [*range(read[rank], read[rank] + len(own))]
            read[rank] += len(own)
        position.advance_past_step(size, None)
        position.end_epoch()


def test_parts_of_a_stream_need_ranks_that_stay() -> None:
    plan: Any = SimpleNamespace(examples=MAX_EXAMPLES, batch_size=6, ranks=2, deterministic=False, shares=(512, 512))
    position = Position()
    check_division(DataSource.DIVIDED_STREAM, plan, position, world_may_change=False, shares_may_change=False)
    assert position.division == "2 ranks, batches of 6"
    with pytest.raises(UserError, match=r"so their number must not change \(--elastic\)"):
        check_division(DataSource.DIVIDED_STREAM, plan, position, world_may_change=True, shares_may_change=False)
    with pytest.raises(
        UserError, match=r"so their shares must not change \(--shares measured\): give numbers, as 3:1:1"
    ):
        check_division(DataSource.DIVIDED_STREAM, plan, position, world_may_change=False, shares_may_change=True)
    check_division(DataSource.STREAM, plan, position, world_may_change=True, shares_may_change=True)


def test_parts_of_a_stream_are_read_on_with_the_same_shares() -> None:
    plan: Any = SimpleNamespace(examples=MAX_EXAMPLES, batch_size=6, ranks=2, deterministic=False, shares=(683, 341))
    position = Position()
    check_division(DataSource.DIVIDED_STREAM, plan, position, world_may_change=False, shares_may_change=False)
    assert position.division == "2 ranks, batches of 6, shares 683:341"
    position.step, plan.shares = 5, (512, 512)
    with pytest.raises(UserError, match="cannot resume with 2 ranks, batches of 6: the parts of the Stream were read"):
        check_division(DataSource.DIVIDED_STREAM, plan, position, world_may_change=False, shares_may_change=False)
