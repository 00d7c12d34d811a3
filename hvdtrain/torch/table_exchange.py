"""How ranks of a new world come by their rows of dealt tables, although some of the earlier ones may be gone.

each rank has      its rows and those that it mirrors, with what the optimizer keeps of them, of the step that it has
                   reached: `hvdtrain.training.held_update` lets all make an update, or none
all ranks          tell which rows they have; each computes who sends what to whom, and they do, some tables at a time
barrier            all have their rows: what was held is dropped
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.exchange.partition import assign_mirrors
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.held_parts import Interval, find_sources, name_lost_ranks, send_states
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.optimizer_methods import read_param_groups
from hvdtrain.torch.shard_state import copy_to_host
from hvdtrain.torch.table_group import connect_transport
from hvdtrain.torch.table_plan import TablePiece
from hvdtrain.torch.table_state import AVERAGE, BLOCK_BYTES, STATE_PREFIX, WEIGHT, read_rows
from hvdtrain.torch.update_undo import copy_state

ROWS, PLAIN = "rows", "plain"  # what is sent of a piece: tensors with a value for each row, and the rest
Need = tuple[Interval, list[Interval]]  # rows, and where they come from


@dataclass(frozen=True)
class HeldRows:
    """Rows of a table that this rank has.

    Attributes:
        piece: which ones; `rank` is this one.
        of_rows: what there is of each.
        plain: what the optimizer keeps of the table besides.
    """

    piece: TablePiece
    of_rows: Mapping[str, Tensor]
    plain: StateDict

    def cut_rows(self, interval: Interval) -> StateDict:
        """Return what there is of some of the rows."""
        begin, end = interval.start - self.piece.begin, interval.end - self.piece.begin
        return {ROWS: {key: value[begin:end] for key, value in self.of_rows.items()}, PLAIN: self.plain}


class TableExchange:
    """Brings each rank its rows of a model's dealt tables in one world after the other."""

    def __init__(
        self,
        dealt: DealtTables,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]],
        average: AveragedModel | None,
    ) -> None:
        """Exchange nothing yet; this rank has its rows of the world that it is in.

        Args:
            dealt: the tables.
            optimizers: returns those of the recipe.
            average: the averaged model; None: there is none.
        """
        self.dealt, self._optimizers = dealt, optimizers
        self._average = {} if average is None else dict(average.module.named_modules())
        self._held: list[HeldRows] = []
        self._is_filled = True  # this rank has its rows of this world
        self._last_ranks: tuple[int, list[int]] = (1, [])  # of the world before: its size, and whose rows were here

    def leave_world(self, is_lost: bool) -> None:
        """Keep what this rank has. is_lost: it is neither the state before nor after an update."""
        dealt = self.dealt
        dealt.transport.close()
        if self._is_filled:
            self._held = [] if is_lost else list(self._list_held())
            mirrors = dealt.groups[0].numbers.mirrors
            self._last_ranks = dealt.transport.size, [dealt.rank, *mirrors[dealt.rank : dealt.rank + 1]]
        self._is_filled = False

    def _list_held(self) -> Iterator[HeldRows]:
        dealt = self.dealt
        for table in range(len(dealt.modules)):
            of_rows, plain = read_rows(dealt, table, self._optimizers(), self._average)
            begin = 0
            for piece in dealt.find_group(table).numbers.held_pieces(table, dealt.rank):
                end = begin + piece.end - piece.begin
                yield HeldRows(piece, {key: value[begin:end] for key, value in of_rows.items()}, plain)
                begin = end

    def join_world(self, world: World) -> None:
        """Deal the rows to the ranks of a world, all of which call this, and make room for those of this rank."""
        hosts = collectives.gather_json(world.host, "tables.hosts")
        transport = connect_transport(world, self.dealt.transport.device)
        self.dealt.deal_rows(transport, assign_mirrors(hosts) if world.size > 1 else [])
        for optimizer in self._optimizers():
            for p in self.dealt.parameters.values():
                optimizer.state.pop(p, None)
        self.dealt.make_rows()

    def exchange_rows(self, reached: int, step: int) -> str | None:
        """Bring all ranks their rows; all of them call this. As `hvdtrain.torch.part_exchange.PartExchange`'s."""
        if reached != step:
            self._held.clear()
        held = [[h.piece.table, h.piece.begin, h.piece.end] for h in self._held]
        answers = collectives.gather_json([held, self._last_ranks], "tables.held")
        holders: dict[int, list[Interval]] = {}
        for rank, (rows, _) in enumerate(answers):
            for table, begin, end in rows:
                holders.setdefault(table, []).append(Interval(rank, begin, end))
        needs = [self._plan_table(table, holders.get(table, [])) for table in range(len(self.dealt.modules))]
        found = [need for need in needs if need is not None]
        if len(found) == len(needs):
            for number, tables in enumerate(self._batch_tables()):
                self._fill_tables(tables, found, f"tables.rows.{number}")
            collectives.barrier("tables.end")
        self._held, self._is_filled = [], True  # otherwise a checkpoint fills them
        if len(found) < len(needs):
            return name_lost_ranks([last for rows, last in answers if rows], "rows of the embedding tables")
        return None

    def _plan_table(self, table: int, holders: Sequence[Interval]) -> list[list[Need]] | None:
        """Return of each rank which pieces of a table it needs, and from which ranks; None: some rows are nowhere."""
        numbers, needs = self.dealt.find_group(table).numbers, []
        for rank in range(self.dealt.transport.size):
            pieces = [Interval(p.rank, p.begin, p.end) for p in numbers.held_pieces(table, rank)]
            found = [find_sources(holders, piece, rank) for piece in pieces]
            needs.append(
                [(piece, sources) for piece, sources in zip(pieces, found, strict=True) if sources is not None]
            )
            if len(needs[-1]) < len(found):
                return None
        return needs

    def _batch_tables(self) -> Iterator[list[int]]:
        """Yield numbers of tables that are exchanged together, the same on all ranks."""
        batch, size = list[int](), 0
        for table, module in enumerate(self.dealt.modules):
            batch.append(table)
            size += module.num_embeddings * module.embedding_dim * module.weight.element_size()
            if size >= BLOCK_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _fill_tables(self, tables: Sequence[int], plan: Sequence[list[list[Need]]], name: str) -> None:
        """Exchange the rows of some tables. plan: of each table, of each rank: what it needs, and from whom."""
        rank, size = self.dealt.rank, self.dealt.transport.size
        outgoing: list[list[StateDict]] = [
            [
                {key: copy_to_host(value) for key, value in self._find_held(table, i).cut_rows(i).items()}
                for table in tables
                for _, sources in plan[table][other]
                for i in sources
                if i.rank == rank != other
            ]
            for other in range(size)
        ]
        needs = [[need for table in tables for need in plan[table][other]] for other in range(size)]
        incoming = [iter(received) for received in send_states(outgoing, needs, name)]
        for table in tables:
            sources = [i for _, found in plan[table][rank] for i in found]
            parts = [
                self._find_held(table, i).cut_rows(i) if i.rank == rank else next(incoming[i.rank]) for i in sources
            ]
            if parts:
                self._load_rows(table, parts)

    def _find_held(self, table: int, interval: Interval) -> HeldRows:
        return next(
            held
            for held in self._held
            if held.piece.table == table and held.piece.begin <= interval.start and interval.end <= held.piece.end
        )

    def _load_rows(self, table: int, parts: Sequence[StateDict]) -> None:
        """Let this rank's rows of a table be these, in their order."""
        module = self.dealt.modules[table]
        device = module.weight.device
        joined: StateDict = {key: torch.cat([part[ROWS][key].to(device) for part in parts]) for key in parts[0][ROWS]}
        module.weight.detach().copy_(joined.pop(WEIGHT))
        if self._average:
            average: Any = self._average[self.dealt.names[table]]
            average.weight.detach().copy_(joined.pop(AVERAGE))
        state = copy_state(parts[0][PLAIN]) | joined
        for optimizer in self._optimizers():
            if state and any(p is module.weight for group in read_param_groups(optimizer) for p in group["params"]):
                optimizer.state[module.weight] = {key.removeprefix(STATE_PREFIX): v for key, v in state.items()}
