"""Outputs of examples, brought to rank 0 in the order of their ids: to be summarised by the recipe, or written.

each rank: (ids, outputs) of its batches      rank 0, by pieces                  all ranks
ids 0 1 | 6 7   p: (4, 3)   --- bytes -->   p: (8, 3), row i of example i  --> what summarise(outputs) returns
ids 2 3 | 4 5   p: (4, 3)   --- bytes -->
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.metrics import MetricValue
from hvdtrain.recipe.order import Ids
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.training.metrics import parse_values

PIECE_BYTES = 16 << 20  # that a rank sends at once, to all ranks: rank 0 keeps it
Outputs = dict[str, NDArray[Any]]  # (examples, ...) by name
Kinds = dict[str, tuple[str, list[int]]]  # of each output: type, and shape of one example


class OutputCollector:
    """Collects a rank's outputs of the batches of an evaluation or a prediction."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._ids: list[Ids] = []
        self._batches: list[Mapping[str, NDArray[Any]]] = []
        self._kinds: Kinds = {}
        self._mismatch = ""  # of two batches, human-readable

    def add_batch(self, ids: Ids, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Add the outputs of a batch; `gather` raises on all ranks if types or shapes differ between batches."""
        kinds: Kinds = {name: (str(array.dtype), list(array.shape[1:])) for name, array in outputs.items()}
        if self._batches:
            examples = f"examples {self._ids[0][0]} and {ids[0]}"
            self._mismatch = self._mismatch or self._find_mismatch(self._kinds, kinds, examples)
        self._kinds = kinds
        self._ids.append(ids)
        self._batches.append(outputs)

    def gather(self, count: int) -> Outputs:
        """Return the outputs of all `count` examples in the order of their ids on rank 0, nothing on other ranks.

        All ranks call it. Raises UserError on all ranks if outputs are not of the same kinds on all.
        """
        ids = np.concatenate([np.empty(0, np.int64), *self._ids])
        found: list[tuple[Kinds, int, str]] = collectives.gather_json(
            [self._kinds, len(ids), self._mismatch], "outputs.kinds"
        )
        rows = [number for _, number, _ in found]
        senders, mismatches = [rank for rank, number in enumerate(rows) if number], [text for *_, text in found]
        for rank in senders[1:]:
            between = f"ranks {senders[0]} and {rank}"
            mismatches.append(self._find_mismatch(found[senders[0]][0], found[rank][0], between))
        if mismatch := next(filter(None, mismatches), ""):
            raise UserError(mismatch)
        all_ids = self._send("outputs.ids", ids, rows, np.arange(sum(rows)))
        gathered: Outputs = {}
        for name, (dtype, shape) in found[senders[0]][0].items():
            own = [batch[name] for batch in self._batches]
            joined = np.concatenate(own) if own else np.empty((0, *shape), dtype)
            gathered[name] = self._send(f"outputs.{name}", joined, rows, all_ids)
        assert collectives.rank() or len(all_ids) == count
        return gathered

    def _send(self, name: str, own: NDArray[Any], rows: list[int], places: Ids) -> NDArray[Any]:
        """Return all ranks' rows on rank 0, an empty array on others.

        Args:
            name: of the collectives.
            own: (rows of this rank, ...).
            rows: of each rank.
            places: on rank 0, the place of each row in the result, rank by rank.
        """
        if collectives.size() == 1:
            result = np.empty_like(own)
            result[places] = own
            return result
        is_root, row_bytes = collectives.rank() == 0, own.dtype.itemsize * int(np.prod(own.shape[1:]))
        result = np.empty((sum(rows) if is_root else 0, *own.shape[1:]), own.dtype)
        step, starts = max(1, PIECE_BYTES // max(1, row_bytes)), np.cumsum([0, *rows[:-1]])
        for first in range(0, max(rows) if row_bytes else 0, step):
            found = collectives.gather_rows(own[first : first + step], name)
            if is_root:
                bounds = zip(starts, rows, strict=True)
                taken = [places[start + min(first, n) : start + min(first + step, n)] for start, n in bounds]
                result[np.concatenate(taken)] = found
        return result

    def _find_mismatch(self, one: Kinds, other: Kinds, between: str) -> str:
        """Return which output is of two kinds, human-readable; "" if none is."""
        for name in [*one, *other]:
            here, there = describe_kind(one, name), describe_kind(other, name)
            if here != there:
                return (
                    f"{type(self.recipe).__name__}: the output {name!r} is {here} and {there} for {between}; expected "
                    "the same type and shape for all examples: pad to a fixed size"
                )
        return ""


def describe_kind(kinds: Kinds, name: str) -> str:
    """Return type and shape of an output, human-readable: `(B, 3) float32`."""
    if name not in kinds:
        return "missing"
    dtype, shape = kinds[name]
    return f"(B{''.join(f', {size}' for size in shape)}) {dtype}"


def summarise_outputs(collector: OutputCollector, count: int) -> dict[str, MetricValue]:
    """Return what the recipe's `summarise` makes of the outputs of `count` examples on rank 0, on all ranks.

    Raises UserError, RecipeError: on all ranks alike.
    """
    outputs = collector.gather(count)

    def call_summarise() -> dict[str, MetricValue]:
        with np.errstate(all="ignore"), in_recipe(collector.recipe, "summarise()"):
            found = collector.recipe.summarise(outputs)
        return parse_values(collector.recipe, "summarise()", found)

    return collectives.on_root("evaluation.summary", call_summarise)
