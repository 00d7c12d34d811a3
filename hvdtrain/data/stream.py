"""Examples that can only be read one after the other, from an iterable that has no length.

    Stream(factory)     factory()                      all of the stream, the same on every rank
                        factory(rank, size)            the part of it that this rank reads
                        factory(rank, size, offset)    this part from its example `offset` on

Of a whole stream every rank takes the examples of its share and passes over the others: step k consumes the same ones
on any number of ranks, at the cost that each rank reads all. A part costs no rank more than its share; what a step
consumes depends on the number of ranks then, and a run keeps the number it began with.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hvdtrain.recipe.order import MAX_EXAMPLES
from hvdtrain.system.errors import UserError


class Stream:
    """A training dataset that is read in order: pages of a crawl, a queue, a generator.

        def dataset(self, split):
            return Stream(lambda: read_pages(self.url), examples_per_epoch=100_000)

    The position is saved in checkpoints; a resumed run reads up to there, or begins there if the factory takes an
    `offset`: the number of examples that this rank has had since the run began. A stream that ends is begun again.
    An epoch is a number of examples, not a pass over the stream. There is no ledger: examples have no numbers.

    Randomness that the iterable draws from torch's, numpy's or Python's global generators is seeded for each example.
    """

    def __init__(self, factory: Callable[..., Iterable[Any]], examples_per_epoch: int | None = None) -> None:
        """Describe a stream.

        Args:
            factory: returns a new iterable at each call; see above for its parameters.
            examples_per_epoch: over all ranks; None: the run has no epochs, its length is given by --steps.

        Raises:
            UserError: for other parameters, or an epoch without examples.
        """
        if not callable(factory):
            raise UserError(f"Stream({type(factory).__name__}, ...): expected a function that returns a new iterable")
        if examples_per_epoch is not None and examples_per_epoch < 1:
            raise UserError(f"Stream(..., examples_per_epoch={examples_per_epoch}): expected 1 at least")
        self.factory, self.examples_per_epoch = factory, examples_per_epoch
        self._parameters = _count_parameters(factory)
        self._rank, self._size = 0, 1
        self._iterator: Iterator[Any] | None = None
        self._next = 0  # the number of the example that the iterator gives next
        self._process = os.getpid()  # that the iterator belongs to

    @property
    def is_divided(self) -> bool:
        """Whether each rank reads a part of its own."""
        return self._parameters > 0

    @property
    def epoch_examples(self) -> int:
        """The length of an epoch; MAX_EXAMPLES if it is not known."""
        return self.examples_per_epoch or MAX_EXAMPLES

    def assign_part(self, rank: int, size: int) -> None:
        """Set which part of a divided stream this process reads: that of `rank` of `size` ranks."""
        self._rank, self._size, self._iterator = rank, size, None

    def read_examples(self, first: int, count: int, prepare: Callable[[int], object]) -> list[Any]:
        """Return `count` examples from number `first` on, of the stream or of this rank's part of it.

        Args:
            first: if it is not where the last call ended, examples are passed over, from the beginning if need be.
            count: of examples.
            prepare: called with an example's number before it is read, also if it is passed over.

        Raises:
            UserError: the stream has no examples, or cannot be read again.
        """
        if self._iterator is None or first < self._next or self._process != os.getpid():
            self._begin(first if self._parameters == 3 else 0)
        while self._next < first:
            self._read_next(prepare)
        return [self._read_next(prepare) for _ in range(count)]

    def _begin(self, offset: int) -> None:
        former = self._iterator if self._process == os.getpid() else None
        arguments = (self._rank, self._size, offset)[: self._parameters]
        iterator = iter(self.factory(*arguments))
        if iterator is former:
            raise UserError("a Stream's factory returned the same iterator again; expected a new one at each call")
        self._iterator, self._next, self._process = iterator, offset, os.getpid()

    def _read_next(self, prepare: Callable[[int], object]) -> Any:
        prepare(self._next)
        assert self._iterator is not None
        for example in self._iterator:
            self._next += 1
            return example
        place = self._next
        self._begin(place)
        for example in self._iterator:
            self._next += 1
            return example
        offset = (
            f" by its factory with offset={place}: that counts the examples since the run began, so take it modulo "
            "those that there are"
        )
        again = offset if place and self._parameters == 3 else ""
        raise UserError(f"a Stream has ended after {place} examples, and is empty when it is begun again{again}")

    def __getstate__(self) -> dict[str, object]:
        """Return the stream without its iterator, which another process makes for itself."""
        return vars(self) | {"_iterator": None}


def _count_parameters(factory: Callable[..., Iterable[Any]]) -> int:
    """Return how many arguments a factory takes: 0, 2 or 3."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return 0
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    if len(places) not in (0, 2, 3):
        raise UserError(
            f"a Stream's factory takes {', '.join(p.name for p in places)}; expected no parameters, (rank, size) or "
            "(rank, size, offset)"
        )
    return len(places)
