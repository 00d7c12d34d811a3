"""Embedding tables with rows of one width and type, dealt to the ranks: where rows are, and how they travel.

    rank that looks up      numbers of rows, each once -->   rank that has the rows
                            <-------------------- rows       of the weights
    in backward             gradients of rows ----------->   added up, of all ranks that have looked up the row
    rank that mirrors them  <---------- sums of the step     in an elastic run

Every rank takes part in each of these, with no number if it looks nothing up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.comm.torch_group import TorchGroup
from hvdtrain.comm.torch_ranks import connect_ranks, open_store
from hvdtrain.comm.world import World, connections
from hvdtrain.system import activity
from hvdtrain.torch.table_plan import RowNumbers

Table: TypeAlias = nn.Embedding | nn.EmbeddingBag


class RowTransport:
    """Carries rows between the ranks of a world, in the same order on all of them.

    Attributes:
        rank: this process's.
        size: the number of ranks.
        device: of the rows.
        bytes_sent: by this rank so far.
    """

    def __init__(self, group: TorchGroup | None, device: torch.device) -> None:
        """Carry rows by a group of all ranks, until the world is left; None: there is one rank."""
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.device, self.bytes_sent = device, 0
        self._group = group
        connections.add(self)

    def close(self) -> None:
        """Leave the group, unless that is done; collectives of other ranks that wait for this one fail."""
        if self in connections:
            connections.discard(self)
            if self._group is not None:
                self._group.abort()

    def swap_counts(self, counts: Sequence[int]) -> list[int]:
        """Send each rank a number, and return those received, in the order of ranks."""
        if self._group is None:
            return list(counts)
        with activity.waiting_in_collective("tables.counts"):
            return self._group.start_all_to_all(torch.tensor(counts, device=self.device)).wait().tolist()

    def swap_rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send `sent[i]` of the rows (sum(sent), ...) to rank i; return those received, in the order of ranks."""
        if self._group is None:
            return rows
        self.bytes_sent += rows.nbytes - rows[0:1].nbytes * sent[self.rank]
        with activity.waiting_in_collective("tables.rows"):
            return self._group.start_all_to_all_rows(rows, sent, received).wait()

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self._group is None:
            return value
        sent = torch.tensor([value], dtype=torch.float64, device=self.device)
        with activity.waiting_in_collective("tables.sum"):
            return float(self._group.start_all_reduce(sent, average=False).wait())


def connect_transport(world: World, device: torch.device) -> RowTransport:
    """Return what carries rows between the ranks of a world, all of which call this. Raises PeersLost."""
    if world.size == 1:
        return RowTransport(None, device)
    store = open_store()
    group = connect_ranks(store, "tables", range(world.size), world, device)
    collectives.on_all_ranks("tables.connected", lambda: None)
    store.close()
    return RowTransport(group, device)


@dataclass(frozen=True)
class Mirror:
    """Which rank mirrors this one's rows, and where they are there.

    Attributes:
        rank: it.
        mirrored: whose rows this rank mirrors.
        first_places: where this rank has its rows of each table, (tables,).
        shifts: from there to the mirror's places, (tables,).
    """

    rank: int
    mirrored: int
    first_places: Tensor
    shifts: Tensor

    @classmethod
    def find(cls, numbers: RowNumbers, rank: int, device: torch.device) -> Mirror:
        """Return the mirror of a rank."""
        mirror, tables = list(numbers.mirrors).index(rank), sorted({piece.table for piece in numbers.pieces})
        first = [numbers.held_slice(table, rank).start for table in tables]
        there = [numbers.held_slice(table, mirror).start + numbers.count_own(table, mirror) for table in tables]
        first_places, mirror_places = torch.tensor(first, device=device), torch.tensor(there, device=device)
        return cls(mirror, numbers.mirrors[rank], first_places, mirror_places - first_places)

    def add_mirrored(self, places: Tensor, values: Tensor, transport: RowTransport) -> tuple[Tensor, Tensor]:
        """Send this rank's gradients to the mirror; return them with those of the rows that this rank mirrors.

        Args:
            places: (u,) of this rank's own rows, sorted.
            values: (u, width), their gradients.
            transport: to all ranks, which all call this.

        Returns:
            The places of both, sorted, and their gradients.
        """
        sent, received = [0] * transport.size, [0] * transport.size
        sent[self.rank] = len(places)
        received[self.mirrored] = transport.swap_counts(sent)[self.mirrored]
        tables = torch.searchsorted(self.first_places, places, right=True) - 1
        theirs = transport.swap_rows(places + self.shifts[tables], sent, received)
        values = torch.cat([values, transport.swap_rows(values, sent, received)])
        places, order = torch.sort(torch.cat([places, theirs]))
        return places, values[order]


@dataclass(frozen=True)
class RowTicket:
    """A lookup whose gradients may follow.

    Attributes:
        inverse: (N,) of each id, which of the numbers that were sent it is.
        wanted: (sum(received),) which of this rank's rows others have looked up.
        sent, received: how many numbers each rank got, and sent.
        tables: that were looked up.
    """

    inverse: Tensor
    wanted: Tensor
    sent: Sequence[int]
    received: Sequence[int]
    tables: Sequence[int]


class TableGroup:
    """This rank's rows of tables with rows of one width and type.

    Attributes:
        modules: the model's tables of this group, by their numbers.
        numbers: of their rows.
        rows: (held rows, width) this rank's, and those that it mirrors, of which the modules' weights are views; None:
            the weights are whole yet.
    """

    def __init__(self, modules: Mapping[int, Table], numbers: RowNumbers, transport: RowTransport) -> None:
        self.modules, self.numbers, self.transport = modules, numbers, transport
        self.rank = transport.rank
        self.rows: Tensor | None = None
        self.slices = {table: numbers.held_slice(table, self.rank) for table in modules}
        self._own_counts = {table: numbers.count_own(table, self.rank) for table in modules}
        self._mirror = Mirror.find(numbers, self.rank, transport.device) if numbers.mirrors else None
        self._bounds = torch.tensor(numbers.bounds, device=transport.device)
        # Rows are counted through all tables, then looked for among the first rows of pieces.
        row_counts = [module.num_embeddings for module in modules.values()]
        before = itertools.accumulate(row_counts[:-1], initial=0)
        self._tables = {table: own for table, *own in zip(modules, before, row_counts, strict=True)}
        pieces = sorted(numbers.pieces, key=lambda piece: (piece.table, piece.begin))
        first_rows = [self._tables[piece.table][0] + piece.begin for piece in pieces]
        self._first_rows = torch.tensor(first_rows, device=transport.device)
        self._first_numbers = torch.tensor([numbers.first_numbers[p] for p in pieces], device=transport.device)
        self._pending: list[tuple[Tensor, Tensor]] = []  # of the step: rows of this rank, and their gradients
        self._used: set[int] = set()  # tables, in the step

    @property
    def width(self) -> int:
        """The number of values of a row."""
        return int(next(iter(self.modules.values())).weight.shape[1])

    def make_rows(self, modules: Mapping[int, Table]) -> Tensor:
        """Let the weights of modules be this rank's rows, which are zero; return all of them, (held rows, width)."""
        first = next(iter(modules.values())).weight
        held = first.new_zeros((self.numbers.bounds[self.rank + 1] - self.numbers.bounds[self.rank], self.width))
        for table, module in modules.items():
            module.weight.data, module.weight.grad = held[self.slices[table]], None
        return held

    def take_rows(self, modules: Mapping[int, Table]) -> Tensor:
        """Leave the weights of modules, which are whole, this rank's rows; return all of these, (held rows, width)."""
        whole = {table: module.weight.detach() for table, module in modules.items()}
        held = self.make_rows(modules)
        for table, values in whole.items():
            held[self.slices[table]] = self.cut_rows(table, values)
        return held

    def adopt_rows(self, modules: Mapping[int, Table]) -> Tensor:
        """Return the rows of modules that have this rank's rows only, in one tensor of which the weights are views."""
        own = torch.cat([module.weight.detach() for module in modules.values()])
        for table, module in modules.items():
            module.weight.data = own[self.slices[table]]
        return own

    def cut_rows(self, table: int, whole: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that has a row for each of a table."""
        pieces = self.numbers.held_pieces(table, self.rank)
        return torch.cat([whole[piece.begin : piece.end] for piece in pieces]) if pieces else whole[:0]

    # Lookups.

    def number_rows(self, ids: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Return the numbers of rows, (N,). Raises IndexError for an id that is out of range.

        ids: tables and what is looked up in them, (n,) each.
        """
        device = self._bounds.device
        lengths = torch.tensor([len(own) for _, own in ids], device=device)
        facts = torch.tensor([self._tables[table] for table, _ in ids], device=device).repeat_interleave(lengths, 0)
        first, counts = facts.unbind(1)
        rows = torch.cat([own for _, own in ids])
        if ((rows < 0) | (rows >= counts)).any():
            raise IndexError("index out of range in self")
        rows = rows + first
        piece = torch.searchsorted(self._first_rows, rows, right=True) - 1
        return rows + (self._first_numbers - self._first_rows)[piece]

    def fetch_rows(self, numbers: Tensor, tables: Sequence[int], rows: Tensor) -> tuple[Tensor, RowTicket]:
        """Return the rows with these numbers, (N, width), from the ranks that have them; all ranks call this.

        Args:
            numbers: (N,).
            tables: that they are of.
            rows: (held rows, width) of this rank.
        """
        unique, inverse = torch.unique(numbers, return_inverse=True)
        sent = torch.searchsorted(unique, self._bounds).diff().tolist()
        received = self.transport.swap_counts(sent)
        wanted = self.transport.swap_rows(unique, sent, received) - self._bounds[self.rank]
        fetched = self.transport.swap_rows(rows.index_select(0, wanted), received, sent)
        return fetched.index_select(0, inverse), RowTicket(inverse, wanted, sent, received, tables)

    def return_gradients(self, gradients: Tensor, ticket: RowTicket) -> None:
        """Send gradients (N, width) of what was looked up to the ranks that have the rows; all ranks call this."""
        summed = gradients.new_zeros((sum(ticket.sent), self.width)).index_add_(0, ticket.inverse, gradients)
        arrived = self.transport.swap_rows(summed, ticket.sent, ticket.received)
        self._pending.append((ticket.wanted, arrived))
        self._used.update(ticket.tables)

    def empty_numbers(self) -> Tensor:
        """Return no numbers, for a rank that looks nothing up."""
        return self._bounds[:0]

    # Gradients.

    def start_step(self) -> None:
        """Forget the gradients of the last step."""
        self._pending.clear()
        self._used.clear()

    def set_gradients(self) -> None:
        """Let the weights that were looked up in the step have their gradients: sparse ones if the table says so."""
        assert self.rows is not None
        trained = {t: self.modules[t] for t in sorted(self._used) if self.modules[t].weight.requires_grad}
        sparse = {t: module for t, module in trained.items() if module.sparse}
        if not trained:
            return
        wanted = torch.cat([places for places, _ in self._pending])
        gradients = torch.cat([values for _, values in self._pending])
        self._pending.clear()
        if sparse or self._mirror is not None:
            places, inverse = torch.unique(wanted, return_inverse=True)
            gradients = gradients.new_zeros((len(places), self.width)).index_add_(0, inverse, gradients)
            wanted = places
        if self._mirror is not None:
            wanted, gradients = self._mirror.add_mirrored(wanted, gradients, self.transport)
        if len(sparse) < len(trained):
            whole = torch.zeros_like(self.rows).index_add_(0, wanted, gradients)
            for table in trained.keys() - sparse.keys():
                trained[table].weight.grad = whole[self.slices[table]] if len(trained[table].weight) else None
        if sparse:
            self._set_sparse({t: module for t, module in sparse.items() if len(module.weight)}, wanted, gradients)

    def _set_sparse(self, modules: Mapping[int, Table], places: Tensor, values: Tensor) -> None:
        """places: (u,) of the rows that this rank holds, sorted. values: (u, width), their gradients."""
        slices = {table: self.slices[table] for table in modules}
        edges = torch.tensor([edge for s in slices.values() for edge in (s.start, s.stop)], device=places.device)
        found = torch.searchsorted(places, edges).tolist()
        for (table, own), begin, end in zip(slices.items(), found[::2], found[1::2], strict=True):
            weight = modules[table].weight
            indices = (places[begin:end] - own.start).unsqueeze(0)
            weight.grad = torch.sparse_coo_tensor(
                indices, values[begin:end], weight.shape, is_coalesced=True, check_invariants=False
            )

    def list_gradients(self) -> Iterable[Tensor]:
        """Yield the values of the weights' gradients, of each row on one rank."""
        for table, module in self.modules.items():
            gradient, count = module.weight.grad, self._own_counts[table]
            if gradient is None:
                continue
            if gradient.is_sparse and self._mirror is not None:
                count = int(torch.searchsorted(gradient._indices()[0], count))  # they are coalesced
            elif gradient.is_sparse:
                count = gradient._nnz()
            yield gradient._values()[:count] if gradient.is_sparse else gradient[:count]
