"""Embedding tables with rows of one width and type, dealt to the ranks: where rows are, and how they travel.

    rank that looks up      numbers of rows, each once -->   rank that has the rows
                            <-------------------- rows       of the weights
    in backward             gradients of rows ----------->   added up, of all ranks that have looked up the row

Every rank takes part in each of these, with no number if it looks nothing up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hvdtrain.comm.torch_group import TorchGroup
from hvdtrain.system import activity
from hvdtrain.torch.table_plan import RowNumbers

Table: TypeAlias = nn.Embedding | nn.EmbeddingBag


class RowTransport:
    """Carries rows between the ranks of a group, in the same order on all of them.

    Attributes:
        group: of all ranks.
        bytes_sent: by this rank so far.
    """

    def __init__(self, group: TorchGroup) -> None:
        self.group, self.bytes_sent = group, 0

    def swap_counts(self, counts: Sequence[int]) -> list[int]:
        """Send each rank a number, and return those received, in the order of ranks."""
        with activity.waiting_in_collective("tables.counts"):
            sent = torch.tensor(counts, device=self.group.device)
            return self.group.start_all_to_all(sent).wait().tolist()

    def swap_rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send `sent[i]` of the rows (sum(sent), ...) to rank i; return those received, in the order of ranks."""
        self.bytes_sent += rows.nbytes - rows[0:1].nbytes * sent[self.group.rank()]
        with activity.waiting_in_collective("tables.rows"):
            return self.group.start_all_to_all_rows(rows, sent, received).wait()


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
        rows: (own rows, width) this rank's, of which the modules' weights are views; None: the weights are whole yet.
    """

    def __init__(self, modules: Mapping[int, Table], numbers: RowNumbers, transport: RowTransport) -> None:
        self.modules, self.numbers, self.transport = modules, numbers, transport
        self.rank = transport.group.rank()
        self.rows: Tensor | None = None
        self._bounds = torch.tensor(numbers.bounds, device=transport.group.device)
        self._first_ids: dict[int, Tensor] = {}  # of each table's pieces
        self._shifts: dict[int, Tensor] = {}  # from a piece's ids to numbers
        for table in modules:
            pieces = [piece for piece in numbers.pieces if piece.table == table]
            shifts = [numbers.first_numbers[piece] - piece.begin for piece in pieces]
            self._first_ids[table] = torch.tensor([p.begin for p in pieces], device=transport.group.device)
            self._shifts[table] = torch.tensor(shifts, device=transport.group.device)
        self._pending: list[tuple[Tensor, Tensor]] = []  # of the step: rows of this rank, and their gradients
        self._used: set[int] = set()  # tables, in the step

    @property
    def width(self) -> int:
        """The number of values of a row."""
        return int(next(iter(self.modules.values())).weight.shape[1])

    def take_rows(self, modules: Mapping[int, Table]) -> Tensor:
        """Leave the weights of modules, which are whole, this rank's rows; return all of these, (own rows, width)."""
        first = next(iter(modules.values())).weight
        own = first.new_empty((self.numbers.bounds[self.rank + 1] - self.numbers.bounds[self.rank], self.width))
        for table, module in modules.items():
            view = own[self.numbers.own_slice(table, self.rank)]
            view.copy_(self.cut_rows(table, module.weight.detach()))
            module.weight.data = view
        return own

    def adopt_rows(self, modules: Mapping[int, Table]) -> Tensor:
        """Return the rows of modules that have this rank's rows only, in one tensor of which the weights are views."""
        own = torch.cat([module.weight.detach() for module in modules.values()])
        for table, module in modules.items():
            module.weight.data = own[self.numbers.own_slice(table, self.rank)]
        return own

    def cut_rows(self, table: int, whole: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that has a row for each of a table."""
        pieces = self.numbers.own_pieces(table, self.rank)
        return torch.cat([whole[piece.begin : piece.end] for piece in pieces]) if pieces else whole[:0]

    # Lookups.

    def number_rows(self, ids: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Return the numbers of rows, (N,). Raises IndexError for an id that is out of range.

        ids: tables and what is looked up in them, (n,) each.
        """
        found, odd = [], []
        for table, own in ids:
            rows, shifts = self.modules[table].num_embeddings, self._shifts[table]
            odd.append(((own < 0) | (own >= rows)).any())
            if len(shifts) == 1:
                found.append(own + shifts)
            else:
                place = torch.searchsorted(self._first_ids[table], own, right=True) - 1
                found.append(own + shifts[place.clamp_(min=0)])
        if torch.stack(odd).any():
            raise IndexError("index out of range in self")
        return torch.cat(found)

    def fetch_rows(self, numbers: Tensor, tables: Sequence[int], rows: Tensor) -> tuple[Tensor, RowTicket]:
        """Return the rows with these numbers, (N, width), from the ranks that have them; all ranks call this.

        Args:
            numbers: (N,).
            tables: that they are of.
            rows: (own rows, width) of this rank.
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
        trained = {t: module for t, module in trained.items() if len(module.weight)}
        sparse = {t: module for t, module in trained.items() if module.sparse}
        if not trained:
            return
        wanted = torch.cat([places for places, _ in self._pending])
        gradients = torch.cat([values for _, values in self._pending])
        self._pending.clear()
        if len(sparse) < len(trained):
            whole = torch.zeros_like(self.rows).index_add_(0, wanted, gradients)
            for table in trained.keys() - sparse.keys():
                trained[table].weight.grad = whole[self.numbers.own_slice(table, self.rank)]
        if sparse:
            places, inverse = torch.unique(wanted, return_inverse=True)
            values = gradients.new_zeros((len(places), self.width)).index_add_(0, inverse, gradients)
            self._set_sparse(sparse, places, values)

    def _set_sparse(self, modules: Mapping[int, Table], places: Tensor, values: Tensor) -> None:
        """places: (u,) of this rank's rows, sorted. values: (u, width), their gradients."""
        slices = {table: self.numbers.own_slice(table, self.rank) for table in modules}
        edges = torch.tensor([edge for s in slices.values() for edge in (s.start, s.stop)], device=places.device)
        found = torch.searchsorted(places, edges).tolist()
        for (table, own), begin, end in zip(slices.items(), found[::2], found[1::2], strict=True):
            weight = modules[table].weight
            indices = (places[begin:end] - own.start).unsqueeze(0)
            weight.grad = torch.sparse_coo_tensor(
                indices, values[begin:end], weight.shape, is_coalesced=True, check_invariants=False
            )

    def list_gradients(self) -> Iterable[Tensor]:
        """Yield the values of the weights' gradients."""
        for module in self.modules.values():
            if (gradient := module.weight.grad) is not None:
                yield gradient._values() if gradient.is_sparse else gradient
