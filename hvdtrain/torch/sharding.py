"""How a loss's optimizer is divided among the ranks, in one world after the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.partition import Partition, assign_mirrors
from hvdtrain.torch.held_parts import HeldPart, take_parts
from hvdtrain.torch.shard_trial import DivisionTrial, find_shard_unit
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.update_settings import UpdateSettings


class OptimizerSharding:
    """Divides an optimizer in each world that it joins.

    Attributes:
        shards: this rank's part in this world; None if every rank has all of the optimizer.
        held: what this rank has from earlier worlds, until all ranks have their parts in this one.
        is_filled: whether the pieces of this world have their state.
        last_parts: the number of ranks of the world before, and those whose parts this rank had there.
    """

    def __init__(self, settings: UpdateSettings, name: str) -> None:
        """Divide nothing yet. name: of the collectives."""
        self.settings, self.name = settings, name
        self.shards: OptimizerShards | None = None
        self.held: list[HeldPart] = []
        self.is_filled = True
        self.last_parts: tuple[int, list[int]] = (1, [])
        self._trial: DivisionTrial | None = None  # of the optimizer, if it is to be divided
        self._trained: frozenset[str] = frozenset()  # parameters, when the process began

    def try_optimizer(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        """Find out how an optimizer that is not wrapped may be divided, if it is to be; all ranks call this."""
        options = self.settings.options.exchange
        if options.shards_optimizer and (world.size > 1 or options.is_mirrored):
            self._trial = find_shard_unit(optimizer, self.settings.recipe_name, self.settings.model)
            named = self.settings.model.named_parameters()
            self._trained = frozenset(name for name, p in named if p.requires_grad)

    def divide(self, optimizer: torch.optim.Optimizer, exchange: BucketedExchange | None, world: World) -> list[str]:
        """Divide a wrapped optimizer, if it is to be; return lines to print. All ranks call this.

        In a world after the first one the pieces have no state until `hvdtrain.torch.part_exchange` fills them.
        """
        if self._trial is None:
            return []
        answers = collectives.gather_json([world.host, self._trial.unit], f"{self.name}shard.ranks")
        hosts = [host for host, _ in answers]
        unit = "parameters" if any(found == "parameters" for _, found in answers) else self._trial.unit
        mirrors = assign_mirrors(hosts) if self.settings.options.exchange.is_mirrored and world.size > 1 else []
        partition = Partition(world.size, unit, mirrors)
        self.shards = OptimizerShards(optimizer, partition, exchange, self.name, self._trained)
        return [self.shards.describe(self._trial.state_bytes)] if world.size > 1 else []

    def leave_world(self, averages: Mapping[nn.Parameter, Tensor], is_lost: bool) -> None:
        """Undo an update that was begun, and keep what this rank has of the optimizer's state for the next world.

        Args:
            averages: of pieces, if parameters are averaged.
            is_lost: whether what this rank has is neither the state before nor after an update.
        """
        if self.shards is None:
            return
        if self.shards.undo is not None:
            self.shards.undo.restore()
        if self.is_filled:
            self.held += [] if is_lost else take_parts(self.shards, averages)
            partition, rank = self.shards.partition, self.shards.rank
            self.last_parts = partition.size, [rank, *partition.mirrors[rank : rank + 1]]
        self.shards.forget_state()
        self.shards, self.is_filled = None, False
