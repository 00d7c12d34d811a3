"""A recipe with dealt tables whose ranks die at chosen points of chosen steps, for elastic runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.table_exchange import TableExchange
from hvdtrain.torch.table_group import Mirror, TableGroup
from hvdtrain.training.held_update import HeldUpdate
from tests.ranks.mortal import Faults
from tests.ranks.slow_recipe import SlowDigits
from tests.ranks.table_recipes import Dealt, Precise

PATCHED: list[tuple[Any, str]] = [
    (TableGroup, "return_gradients"),
    (Mirror, "add_mirrored"),
    (HeldUpdate, "make_together"),
    (AveragedModel, "update_parameters"),
    (TableExchange, "exchange_rows"),
]
ORIGINALS = {name: getattr(getattr(owner, name), "original", getattr(owner, name)) for owner, name in PATCHED}


@dataclass(kw_only=True)
class MortalTables(Faults, Dealt):
    """Points: forward, backward, mirror, held, missed, passed, updated, averaged, forming."""

    epochs: int = 6

    def model(self) -> nn.Module:
        inject_faults(self)
        return super().model()

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        if model.training:
            self.suffer("forward")
            self.take_time()
        return super().score(model, batch)


def inject_faults(recipe: MortalTables) -> None:
    """Let the exchange of gradients, the update and the forming of a world call `suffer`.

    A rank that has "missed" that all can make an update has not passed the barrier before it, as far as it knows.
    """

    def die_first(point: str, name: str) -> Any:
        def call(*args: Any) -> Any:
            recipe.suffer(point)
            return ORIGINALS[name](*args)

        return call

    def make_together(held: HeldUpdate, update: Any) -> Any:
        recipe.suffer("held")
        held.update = update
        collectives.barrier("step.held")
        if recipe.is_due("missed"):
            time.sleep(0.3)
            raise collectives.PeersLost("as if the barrier had not reached this rank")
        recipe.suffer("passed")
        held.update = None
        report = update()
        recipe.suffer("updated")
        return report

    changed = {
        "return_gradients": die_first("backward", "return_gradients"),
        "add_mirrored": die_first("mirror", "add_mirrored"),
        "make_together": make_together,
        "update_parameters": die_first("averaged", "update_parameters"),
        "exchange_rows": die_first("forming", "exchange_rows"),
    }
    for owner, name in PATCHED:
        changed[name].original = ORIGINALS[name]
        setattr(owner, name, changed[name])


@dataclass(kw_only=True)
class MortalRecommend(Faults, Precise):  # type: ignore[misc]
    """The recipe `recommend` in float64. Points: forward."""

    def score(self, model: nn.Module, batch: Any) -> Any:
        if model.training:
            self.suffer("forward")
            self.take_time()
        return super().score(model, batch)


class PixelTable(nn.Module):
    """(B, 1, 8, 8) in sixteenths -> (B, 10): the sum of a row of a table for each pixel and its value"""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(64 * 17, 32, mode="sum")
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(32, 10))
        nn.init.normal_(self.table.weight, std=0.05)
        self.register_buffer("first_rows", 17 * torch.arange(64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        values = (16 * x.flatten(1)).round().long().clamp(0, 16)
        return self.head(self.table(self.first_rows + values))  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class SlowTables(SlowDigits):
    """The slow digits by a table."""

    def model(self) -> nn.Module:
        super().model()
        model = PixelTable()
        model.register_state_dict_pre_hook(self.hand_over)  # type: ignore[no-untyped-call]
        return model

    def tables(self, model: Any) -> Any:
        return [model.table]
