"""Embedding tables of which each rank has some rows: lookups, gradients, and the rows themselves.

A lookup is a collective of `score` (`hvdtrain.torch.score_session`): the trial before the first step records which ones
a pass makes, and a rank without examples takes part in them. Gradients of rows are those of the sum of all ranks'
losses, and stay on the rank that has the rows: they are in no bucket, and its optimizer updates them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.pass_record import Exchange
from hvdtrain.torch.piece_owner import share_overflow
from hvdtrain.torch.score_session import ScoreSession
from hvdtrain.torch.shards import sum_squares
from hvdtrain.torch.table_group import RowTicket, RowTransport, Table, TableGroup
from hvdtrain.torch.table_plan import RowNumbers, TableSize, count_piece_rows, deal_tables
from hvdtrain.torch.tensors import all_finite, view_as_real


class DealtTables:
    """The tables of a model.

    Attributes:
        names: of the tables in the model.
        modules: the tables.
        recipe_name: for messages.
        session: the collectives of `score`.
        groups: of tables whose rows travel together.
        whole_state: the optimizer's of each weight, on rank 0, once it was gathered and until it is saved.
        squares: the sum of the squares of all ranks' gradients of rows in the step, scaled as these are.
    """

    def __init__(
        self, recipe_name: str, tables: Mapping[str, Table], session: ScoreSession, transport: RowTransport
    ) -> None:
        """Plan who has which rows; every rank has all of them until `take_rows`.

        tables: by their names in the model.
        """
        self.recipe_name, self.session = recipe_name, session
        self.names, self.modules = list(tables), list(tables.values())
        self.squares = 0.0
        self.whole_state: dict[nn.Parameter, StateDict] = {}
        self._average: list[Table] = []  # the tables of the averaged model
        self._average_rows: list[Tensor] = []  # of each group
        self._joined: dict[str, RowTicket] = {}  # lookups of a pass without an example here
        session.join_lookup = self.join_lookup
        self.deal_rows(transport, [])

    def deal_rows(self, transport: RowTransport, mirrors: Sequence[int]) -> None:
        """Plan which of the ranks that a transport connects has which rows.

        mirrors: of each rank, whose rows it has as well; []: each has its own only.
        """
        self.transport, self.rank = transport, transport.rank
        sizes = [TableSize(module.num_embeddings, module.embedding_dim) for module in self.modules]
        self.pieces = deal_tables(sizes, transport.size)
        kinds: dict[Any, dict[int, Table]] = {}
        for number, module in enumerate(self.modules):
            kinds.setdefault((sizes[number].width, module.weight.dtype), {})[number] = module
        numbers = [
            RowNumbers([p for p in self.pieces if p.table in k], transport.size, mirrors) for k in kinds.values()
        ]
        self.groups = [TableGroup(k, own, transport) for k, own in zip(kinds.values(), numbers, strict=True)]
        self._group_of = {table: number for number, group in enumerate(self.groups) for table in group.modules}

    def describe(self) -> str:
        """Return the line of the plan."""
        row_bytes = [m.embedding_dim * m.weight.element_size() for m in self.modules]
        total = sum(m.num_embeddings * size for m, size in zip(self.modules, row_bytes, strict=True))
        most = [0] * self.transport.size
        for table, rank in itertools.product(range(len(self.modules)), range(self.transport.size)):
            most[rank] += count_piece_rows(self.find_group(table).numbers.held_pieces(table, rank)) * row_bytes[table]
        cut = len([table for table in range(len(row_bytes)) if [p.table for p in self.pieces].count(table) > 1])
        mirrored = ", mirrored" * bool(self.groups[0].numbers.mirrors)
        return (
            f"tables    {max(most) / 2**20:.1f} of {total / 2**20:.1f} MiB of {format_count(len(row_bytes), 'table')} "
            f"on each rank at most, {cut} cut by rows{mirrored}"
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The tables' weights by their names in the model."""
        pairs = zip(self.names, self.modules, strict=True)
        return {f"{name}.weight": cast(nn.Parameter, module.weight) for name, module in pairs}

    def find_group(self, table: int) -> TableGroup:
        """Return the group of a table."""
        return self.groups[self._group_of[table]]

    # The rows.

    def take_rows(self) -> None:
        """Keep this rank's rows only, of tables that are the same on all ranks."""
        for group in self.groups:
            group.rows = group.take_rows(group.modules)

    def adopt_average(self, average: nn.Module | None) -> None:
        """Look up rows of an averaged model, if there is one, in evaluations; this rank has its own of them."""
        if average is None:
            return
        self._average = [cast(Table, average.get_submodule(name)) for name in self.names]
        self._average_rows = [g.adopt_rows({t: self._average[t] for t in g.modules}) for g in self.groups]

    def make_rows(self) -> None:
        """Have memory for this rank's rows, of the averaged model too, which are zero."""
        for group in self.groups:
            group.rows = group.make_rows(group.modules)
        if self._average:
            self._average_rows = [g.make_rows({t: self._average[t] for t in g.modules}) for g in self.groups]

    def get_rows(self, group: int, module: Table, table: int) -> Tensor:
        """Return this rank's rows of a group that a module looks up in. Raises UserError for a copy of the table."""
        rows = self.groups[group].rows
        if module is self.modules[table] and rows is not None:
            return rows
        if self._average and module is self._average[table]:
            return self._average_rows[group]
        raise UserError(
            f"{self.recipe_name} looks up in a copy of the table {self.names[table]!r}, of which no other rank knows: "
            "leave it out of tables(), or give --tables whole"
        )

    # Lookups.

    def look_up(self, calls: Sequence[TableIds]) -> list[Tensor]:
        """Return the rows of the ids of each call, (n, width)."""
        found: dict[int, Tensor] = {}
        for group in sorted({self._group_of[call.table] for call in calls}):
            places = [place for place, call in enumerate(calls) if self._group_of[call.table] == group]
            rows = self._look_up_group(group, [calls[place] for place in places])
            found |= zip(places, torch.split(rows, [len(calls[place].ids) for place in places]), strict=True)
        return [found[place] for place in range(len(calls))]

    def _look_up_group(self, number: int, calls: Sequence[TableIds]) -> Tensor:
        tables, first = [call.table for call in calls], calls[0]
        names = ", ".join(repr(self.names[table]) for table in tables)
        begun = self.session.start_call(f"a lookup in {names}", first.module.weight, ())
        lookup = Lookup(self, number, begun.name, tables)
        if self.session.is_recording:
            rows = torch.cat([call.read_trial_rows() for call in calls])
            fetched, token = FetchRows.apply(first.module.weight.new_zeros((), requires_grad=True), None, rows, lookup)
        else:
            numbers = self.groups[number].number_rows([(call.table, call.ids) for call in calls])
            rows = self.get_rows(number, first.module, first.table)
            start = torch.zeros((), dtype=rows.dtype, device=rows.device, requires_grad=True)
            fetched, token = FetchRows.apply(start, numbers, rows, lookup)
        if token.requires_grad:
            self.session.tie(token)
        return fetched  # type: ignore[no-any-return]

    def join_lookup(self, exchange: Exchange, is_training: bool) -> None:
        """Take part, without ids, in what a pass on another rank looks up, or in the exchange of its gradients."""
        number, *tables = exchange.shape
        group = self.groups[number]
        name = exchange.name.removesuffix(GRADIENT_SUFFIX)
        if exchange.operation == "lookup":
            rows = group.rows if is_training or not self._average else self._average_rows[number]
            assert rows is not None
            _, self._joined[name] = group.fetch_rows(group.empty_numbers(), tables, rows)
        else:
            assert group.rows is not None
            group.return_gradients(group.rows[:0], self._joined.pop(name))

    # A step.

    def start_step(self) -> None:
        """Forget the last step."""
        self._joined.clear()
        for group in self.groups:
            group.start_step()

    def set_gradients(self) -> None:
        """Let the tables' weights have their gradients, of all ranks' examples.

        Raises UserError for a table whose weight is used in another way.
        """
        for name, weight in self.parameters.items():
            if weight.grad is not None:
                raise UserError(
                    f"{self.recipe_name}.score uses {name!r} other than by calling the table, and each rank has some "
                    "of its rows only: leave the table out of tables(), or give --tables whole"
                )
        for group in self.groups:
            group.set_gradients()

    def sum_squares(self) -> bool:
        """Set `squares`, and return whether all gradients of rows are finite; all ranks call this."""
        gradients = [values for group in self.groups for values in group.list_gradients()]
        total = sum_squares(gradients, torch.float32)
        if not math.isfinite(total):  # squares of large float32 values are not
            total = sum_squares(gradients, torch.float64)
        self.squares = self.transport.sum(total)
        return math.isfinite(self.squares)

    def total_norm(self, params: Iterable[nn.Parameter]) -> Tensor:
        """Return the norm, (), of the gradients of these parameters; but for the tables', they are on all ranks."""
        own = set(self.parameters.values())
        others = [p.grad for p in params if p.grad is not None and p not in own]
        dense = [view_as_real(g._values() if g.is_sparse else g) for g in others]
        total = self.squares + sum_squares(dense, torch.float64)
        return torch.tensor(total, dtype=torch.float64, device=self.transport.device).sqrt()

    def agree_on_overflow(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter]
    ) -> Tensor:
        """Let a loss scale skip the step if a gradient is not finite on any rank; return their norm, ().

        The gradients are unscaled by now, but `squares` are not.
        """
        self.squares /= scaler.get_scale() ** 2
        norm = self.total_norm(params)
        share_overflow(scaler, optimizer, norm)
        return norm

    def find_nonfinite(self) -> set[str]:
        """Return the names of the weights whose gradients are not finite on some rank; all ranks call this."""
        own = [name for name, p in self.parameters.items() if p.grad is not None and not all_finite([p.grad])]
        return {name for names in collectives.gather_json(own, "tables.nonfinite") for name in names}


@dataclass(frozen=True)
class TableIds:
    """What is looked up in a table.

    Attributes:
        table: its number.
        module: it, or that of the averaged model, or in a trial a copy.
        ids: (n,) int64.
    """

    table: int
    module: Table
    ids: Tensor

    def read_trial_rows(self) -> Tensor:
        """Return the rows (n, width) in a trial, without other ranks: of weights that are whole, else zeros."""
        weight = self.module.weight.detach()
        if len(weight) == self.module.num_embeddings:
            return torch.nn.functional.embedding(self.ids, weight)
        return weight.new_zeros((len(self.ids), weight.shape[1]))


GRADIENT_SUFFIX = ".gradient"


@dataclass(frozen=True)
class Lookup:
    """One lookup of a pass, with its exchanges in forward and backward."""

    dealt: DealtTables
    group: int
    name: str
    tables: Sequence[int]

    def record(self, dtype: torch.dtype, *, backward: bool) -> bool:
        """Record an exchange in a trial; return whether this is one."""
        session = self.dealt.session
        name, shape = self.name + GRADIENT_SUFFIX * backward, (self.group, *self.tables)
        session.record_exchange(Exchange(name, "lookup_gradient" if backward else "lookup", shape, dtype))
        return session.is_recording


class FetchRows(torch.autograd.Function):
    """The rows of a lookup, which are fetched in forward, and whose gradients are sent in backward.

    `token` is what the loss is tied to, so that the gradients are sent on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, numbers: Tensor | None, rows: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor]:
        ctx.lookup, ctx.ticket = lookup, None
        if lookup.record(rows.dtype, backward=False) or numbers is None:
            return rows.clone(), start.clone()
        session, group = lookup.dealt.session, lookup.dealt.groups[lookup.group]
        with count_exchange(session, group.transport):
            fetched, ctx.ticket = group.fetch_rows(numbers, lookup.tables, rows)
        return fetched, start.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, token: Tensor) -> tuple[Tensor, None, None, None]:
        lookup: Lookup = ctx.lookup
        if not lookup.record(gradient.dtype, backward=True):
            session, group = lookup.dealt.session, lookup.dealt.groups[lookup.group]
            with count_exchange(session, group.transport):
                group.return_gradients(gradient.contiguous(), ctx.ticket)
        return torch.zeros_like(token), None, None, None


@contextlib.contextmanager
def count_exchange(session: ScoreSession, transport: RowTransport) -> Iterator[None]:
    """Count the bytes and seconds of a block as those of the collectives of `score`."""
    began, sent = time.perf_counter(), transport.bytes_sent
    yield
    session.waited += time.perf_counter() - began
    session.bytes_sent += transport.bytes_sent - sent
