"""A recipe whose ranks die in elastic runs, as if each two of them shared a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.comm import host_groups
from hvdtrain.compression.hierarchical_reducer import HierarchicalReducer
from hvdtrain.recipe.registry import load_recipe

Mortal: Any = load_recipe(f"{Path(__file__).with_name('sharded_elastic_recipes.py')}:Mortal")


def arrange_pairs(hosts: Sequence[str]) -> list[list[int]]:
    ranks = range(len(hosts))
    return [list(ranks[first : first + 2]) for first in ranks[::2]]


@dataclass(kw_only=True)
class Paired(Mortal):  # type: ignore[misc]
    """Ranks 0 and 1 on one host, 2 and 3 on another one; a rank may also die in "backward" and "round0" to "round3"."""

    def model(self) -> Any:
        host_groups.arrange_rows = arrange_pairs
        start = HierarchicalReducer.start_round

        def start_round(reducer: HierarchicalReducer, number: int) -> None:
            self.suffer(f"round{number}")
            start(reducer, number)

        HierarchicalReducer.start_round = start_round  # type: ignore[method-assign]
        made = super().model()
        # The last gradient of a backward pass: the other buckets are on their way.
        made.body[0].weight.register_hook(lambda _: self.suffer("backward"))
        return made
