"""Count the collectives of Horovod that any code in this process starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from horovod.torch import mpi_ops


class CallCounter(dict[int, Any]):
    """Horovod's table of collectives in progress, which counts those that are started."""

    calls = 0

    def __setitem__(self, handle: int, tensors: Any) -> None:
        self.calls += 1
        super().__setitem__(handle, tensors)


@contextlib.contextmanager
def count_calls() -> Iterator[CallCounter]:
    """Count the collectives that any code in this process starts; yields the counter."""
    table = mpi_ops._handle_map
    counter = mpi_ops._handle_map = CallCounter(table)
    try:
        yield counter
    finally:
        table.clear()
        table.update(counter)
        mpi_ops._handle_map = table
