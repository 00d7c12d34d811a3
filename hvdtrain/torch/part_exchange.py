"""How ranks of a new world come by their parts of sharded optimizers, although some of the earlier ones may be gone.

each rank has                   its pieces and those that it mirrors, at the step that it has reached; in the middle
                                of an update also as they are after it
if anybody has ended the step   all had updated: roll forward; the parameters are that rank's
else                            roll back
all ranks                       tell what they have; each computes who sends what to whom, and they do, a bucket at
                                a time, so that nobody ever has a whole state
barrier                         all have their parts: what was held is dropped
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.held_parts import (
    AVERAGE,
    HeldPart,
    Interval,
    find_sources,
    join_parts,
    name_lost_ranks,
    send_states,
)
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.optimizer_methods import read_param_groups
from hvdtrain.torch.piece_owner import use_pieces
from hvdtrain.torch.pieces import Piece
from hvdtrain.torch.shard_state import copy_to_host
from hvdtrain.torch.sharded_ema import ShardedAverage
from hvdtrain.torch.sharding import OptimizerSharding
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.table_exchange import TableExchange
from hvdtrain.torch.update import Updater

Need = tuple[Piece, list[Interval]]  # a piece, and where its values come from
Plan = list[list[list[Need]]]  # of each bucket, of each rank: what it needs


class PartExchange:
    """Brings each rank its parts of all sharded optimizers, of the average, and of tables, in one world after another.

    Sharded optimizers and dealt tables exclude each other.
    """

    def __init__(
        self, shardings: Sequence[OptimizerSharding], average: AveragedModel | None, tables: TableExchange | None
    ) -> None:
        """Exchange nothing yet.

        Args:
            shardings: of the optimizers.
            average: of the parameters, divided if the optimizers are; None: there is none.
            tables: of which each rank has some rows; None: there are none.
        """
        self.shardings, self.tables = shardings, tables
        self.average = average if isinstance(average, ShardedAverage) else None
        self._averaged_steps = 0  # of what is held

    @property
    def _divided(self) -> list[tuple[OptimizerSharding, OptimizerShards]]:
        return [(sharding, sharding.shards) for sharding in self.shardings if sharding.shards is not None]

    def leave_world(self, is_lost: bool) -> None:
        """Undo an update that was begun, and keep what this rank has. is_lost: it is of no use."""
        if self.tables is not None:
            self.tables.leave_world(is_lost)
        if self.average is not None and all(sharding.is_filled for sharding in self.shardings):
            self._averaged_steps = int(self.average.n_averaged)
        averages = self.average.release_pieces() if self.average is not None else {}
        for sharding in self.shardings:
            sharding.leave_world(averages, is_lost)

    def join_world(self, world: World) -> None:
        """Make room for the tables' and the average's parts, once the optimizers are divided in a new world."""
        if self.tables is not None:
            self.tables.join_world(world)
        if self.average is not None:
            self.average.divide_again([shards for _, shards in self._divided])

    def exchange_parts(self, reached: int, step: int) -> str | None:
        """Bring all ranks their parts, once each has the model's parameters; all ranks call this.

        Args:
            reached: the step that this rank's state had reached; -1: it had none.
            step: that the parameters belong to; -1: no rank had a state, and all are as at the start.

        Returns:
            A clause about what no rank has any more, the same on all ranks; None: nothing is lost.
        """
        if self.tables is not None:
            return self.tables.exchange_rows(reached, step)
        if not self._divided:
            return None
        self._settle_step(reached, step)
        held = [[part.place for part in sharding.held] for sharding in self.shardings]
        answers = collectives.gather_json([held, [s.last_parts for s in self.shardings]], "parts.held")
        plans: list[Plan] = []
        for number, (_, shards) in enumerate(self._divided):
            holders: dict[str, list[Interval]] = {}
            for rank, (intervals, _) in enumerate(answers):
                for name, start, end in intervals[number]:
                    holders.setdefault(name, []).append(Interval(rank, start, end))
            plan = plan_parts(shards, holders)
            if plan is None and step >= 0:
                self._drop_held()  # a checkpoint fills the pieces
                last_parts = [last[number] for intervals, last in answers if intervals[number]]
                return name_lost_ranks(last_parts, "the optimizer's state")
            plans.append(plan or [])
        for (sharding, shards), plan in zip(self._divided, plans, strict=True):
            self._fill_pieces(sharding, shards, plan)
        for sharding in self.shardings:
            sharding.is_filled = True
        collectives.barrier("parts.end")
        self._drop_held()
        return None

    def _drop_held(self) -> None:
        for sharding in self.shardings:
            sharding.held, sharding.is_filled = [], True

    def _settle_step(self, reached: int, step: int) -> None:
        """Let what is held be of the step that the parameters belong to; drop what cannot be."""
        forward = 0 <= reached == step - 1
        moved = self.average is not None and int(self.average.n_averaged) > self._averaged_steps
        for sharding in self.shardings:
            if reached != step and not forward:
                sharding.held.clear()
            for part in sharding.held:
                if forward and part.next_state is not None:
                    part.state = part.next_state
                part.next_state = None
            if forward and moved and self.average is not None:
                pairs = [(part.average, part.piece.view_parameter()) for part in sharding.held]
                self.average.repeat_move([(average, values) for average, values in pairs if average is not None])

    def _fill_pieces(self, sharding: OptimizerSharding, shards: OptimizerShards, plan: Plan) -> None:
        """Give this rank's pieces their state, and their averages."""
        rank, parts = shards.rank, dict[str, list[HeldPart]]()
        for part in sharding.held:
            parts.setdefault(part.name, []).append(part)

        def cut(piece: Piece, interval: Interval) -> StateDict:
            held = parts[shards.names[piece.param]]
            return next(part for part in held if part.contains(interval)).cut_state(interval.start, interval.end)

        states: dict[nn.Parameter, StateDict] = {}
        for number, (bucket, needs) in enumerate(zip(shards.buckets, plan, strict=False)):
            outgoing = [
                [copy_to_host(cut(piece, i)) for piece, sources in theirs for i in sources if i.rank == rank != other]
                for other, theirs in enumerate(needs)
            ]
            incoming = [iter(received) for received in send_states(outgoing, needs, f"{shards.name}parts.{number}")]
            for (_, values), (piece, sources) in zip(bucket.held, needs[rank], strict=True):
                found = [
                    (i.end - i.start, cut(piece, i) if i.rank == rank else next(incoming[i.rank])) for i in sources
                ]
                states[values] = join_parts(found)
        if self.average is not None:
            averages = {values: state.pop(AVERAGE) for values, state in states.items() if AVERAGE in state}
            self.average.fill_pieces(averages)
        load_states(shards, states)


def make_part_exchange(updater: Updater, average: AveragedModel | None) -> PartExchange:
    """Return what brings each rank its parts, which it has now. average: of --ema; None: there is none."""
    tables = None
    if updater.tables is not None:
        updater.tables.adopt_average(None if average is None else average.module)
        tables = TableExchange(updater.tables, updater.optimizers.values, average)
    return PartExchange([loss.sharding for loss in updater.losses], average, tables)


def plan_parts(shards: OptimizerShards, holders: dict[str, list[Interval]]) -> Plan | None:
    """Return who needs what of an optimizer, and from whom it comes; the same on all ranks. None: some is nowhere."""
    plan: Plan = []
    for bucket in shards.buckets:
        needs: list[list[Need]] = []
        for rank in range(shards.partition.size):
            pieces = [piece for part in bucket.list_held(rank) for piece in part]
            found = [(piece, find_sources(holders.get(shards.names[piece.param], []), piece, rank)) for piece in pieces]
            needs.append([(piece, sources) for piece, sources in found if sources is not None])
            if len(needs[-1]) < len(found):
                return None
        plan.append(needs)
    return plan


def load_states(shards: OptimizerShards, states: dict[nn.Parameter, StateDict]) -> None:
    """Give the optimizer the states of this rank's pieces, as it takes those of a checkpoint."""
    with use_pieces(shards):
        saved = shards.optimizer.state_dict()
        params = [p for group in read_param_groups(shards.optimizer) for p in group["params"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        saved["state"] |= {n: states[p] for n, p in zip(numbers, params, strict=True) if states.get(p)}
        shards.optimizer.load_state_dict(saved)
