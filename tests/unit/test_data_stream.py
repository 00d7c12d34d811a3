"""hvdtrain.data.Stream and Rollouts, without a training."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hvdtrain.data import Rollouts, Stream
from hvdtrain.system.errors import UserError


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
