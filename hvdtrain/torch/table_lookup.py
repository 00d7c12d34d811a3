"""Lookups in embedding tables: of one at a time by calling it, of several at once by `lookup`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdtrain.torch.dealt_tables import DealtTables, TableIds
from hvdtrain.torch.table_group import Table


def lookup(tables: Sequence[nn.Module], inputs: Sequence[Tensor | tuple[Any, ...]]) -> list[Tensor]:
    """Look up in several embedding tables at once, to be called in a model's forward.

    The same as calling each table, but tables that are dealt to the ranks (`Recipe.tables`) exchange ids and rows once
    for all of them instead of once a table.

    Args:
        tables: nn.Embedding or nn.EmbeddingBag.
        inputs: what each is called with: ids, or a tuple of its arguments.

    Returns:
        What each table returns.
    """
    arguments = [x if isinstance(x, tuple) else (x,) for x in inputs]
    forwards = [vars(table).get("forward") for table in tables]
    dealt = [f for f in forwards if isinstance(f, DealtForward)]
    if not dealt or len(dealt) < len(tables):
        return [table(*own) for table, own in zip(tables, arguments, strict=True)]
    calls = [f.parse_call(*own) for f, own in zip(dealt, arguments, strict=True)]
    rows = dealt[0].dealt.look_up([call.ids for call in calls])
    return [call.finish(own) for call, own in zip(calls, rows, strict=True)]


class DealtForward:
    """What stands for the `forward` of a table that is dealt. A deep copy of the model has its own."""

    def __init__(self, dealt: DealtTables, number: int, module: Table) -> None:
        self.dealt, self.number, self.module = dealt, number, module
        self._signature = inspect.signature(type(module).forward)
        self._defaults = {name: parameter.default for name, parameter in self._signature.parameters.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the table returns."""
        call = self.parse_call(*args, **kwargs)
        return call.finish(self.dealt.look_up([call.ids])[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> DealtForward:
        return DealtForward(self.dealt, self.number, copy.deepcopy(self.module, memo))

    def parse_call(self, *args: Any, **kwargs: Any) -> TableCall:
        """Return what the table is called with."""
        given = {"input": args[0]} if len(args) == 1 and not kwargs else None
        if given is None:  # `bind` takes 40 us
            given = self._signature.bind(self.module, *args, **kwargs).arguments
        ids = given["input"].reshape(-1).long()
        return TableCall(TableIds(self.number, self.module, ids), self._defaults | given)


@dataclass(frozen=True)
class TableCall:
    """A call of a table.

    Attributes:
        ids: what is looked up.
        given: the arguments of the table's `forward`.
    """

    ids: TableIds
    given: Mapping[str, object]

    def finish(self, rows: Tensor) -> Tensor:
        """Return what the table returns. rows: (n, width) of the ids."""
        given, module, ids = cast(Any, self.given), cast(Any, self.ids.module), self.ids.ids
        shape = given["input"].shape
        is_padding = None if module.padding_idx is None else ids == module.padding_idx
        if not isinstance(module, nn.EmbeddingBag):
            if is_padding is not None:  # whose rows have no gradient
                rows = torch.where(is_padding.unsqueeze(1), rows.detach(), rows)
            return rows.view(*shape, rows.shape[1])
        places, padding = torch.arange(len(rows), device=rows.device), None
        if is_padding is not None and is_padding.any():  # which belong to no bag
            padding = int(is_padding.nonzero()[0, 0])
            places = torch.where(is_padding, padding, places)
        if not len(rows):
            rows = torch.cat([rows, rows.new_zeros((1, rows.shape[1]))])
        return functional.embedding_bag(
            places.view(shape),
            rows,
            given["offsets"],
            mode=module.mode,
            per_sample_weights=given["per_sample_weights"],
            include_last_offset=module.include_last_offset,
            padding_idx=padding,
        )
