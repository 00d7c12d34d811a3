"""What a pass of `score` exchanges with other ranks, as a trial records it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True)
class Exchange:
    """One collective of a pass.

    Attributes:
        name: the same on all ranks.
        operation: which one.
        shape: of one row of what is gathered, or of what is summed; without its rows if `rows_of` is set. Of a lookup,
            the numbers of the group of tables and of the tables (`hvdtrain.torch.dealt_tables`).
        dtype: as it travels.
        on_device: whether the model's device holds it; otherwise the CPU.
        rows_of: the all-gather whose result has as many rows; "": none.
    """

    name: str
    operation: Literal["all_gather", "all_reduce", "lookup", "lookup_gradient"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool = True
    rows_of: str = ""

    @property
    def is_lookup(self) -> bool:
        """Whether rows of a table, or their gradients, are exchanged: in the order in which ranks start that."""
        return self.operation in ("lookup", "lookup_gradient")


@dataclass(frozen=True)
class CallRecord:
    """One call of a collective in `score`, as its author sees it: `all_gather` of rows of shape (128,)."""

    function: str
    shape: tuple[int, ...]  # of a row, or of all that is summed
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.function} of {self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass
class PassRecord:
    """What a pass exchanges.

    Attributes:
        calls: in forward, in their order, and in what backward computes again (checkpointing).
        num_forward_calls: how many of them are in forward.
        exchanges: in the order in which they were made.
    """

    calls: list[CallRecord] = field(default_factory=list)
    num_forward_calls: int = 0
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def exchanges_examples(self) -> bool:
        """Whether ranks see something of each other's examples."""
        return any(not exchange.is_lookup for exchange in self.exchanges)

    def describe_calls(self) -> str:
        """Return the calls in one line, to compare ranks."""
        return "; ".join(map(str, self.calls)) or "none"
