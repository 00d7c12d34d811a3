"""Which rows of embedding tables belong to which rank.

    table 0, rows 0 ... 9        [ rank 0 . . . . | rank 1 . . . . ]      larger than a share: cut by rows
    table 1                      [ rank 1 . . ]                           whole, with the rank that has least so far
    table 2                      [ rank 0 . ]

The rows of tables that travel together are numbered anew, by rank, table and row, so that the sorted numbers of a
lookup are sorted by the ranks that have them:

    rank 0: table 0, rows 0-4 | table 2      rank 1: table 0, rows 5-9 | table 1
            0 ... 4             5 6                  7 ... 11            12 13 14

In an elastic run a rank also holds the rows of another one, its mirror: of each table behind its own. Their places
there are left out of the numbering, so that a number always says where in its owner's memory the row is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from hvdtrain.recipe.order import part_bounds


@dataclass(frozen=True)
class TableSize:
    """The shape of a table."""

    rows: int
    width: int  # values of a row

    @property
    def values(self) -> int:
        """How many values the table has."""
        return self.rows * self.width


@dataclass(frozen=True)
class TablePiece:
    """Rows of a table that are on one rank."""

    table: int
    begin: int
    end: int
    rank: int


def deal_tables(sizes: Sequence[TableSize], ranks: int) -> list[TablePiece]:
    """Return the pieces of tables, by table and row: the largest is dealt first, to the rank that has least.

    Tables with more values than 1 / ranks of all are cut by rows into equal pieces.
    """
    share = max(1, -(-sum(size.values for size in sizes) // ranks))
    cuts = [(table, size, max(1, min(size.rows, -(-size.values // share)))) for table, size in enumerate(sizes)]
    parts = [(table, *part_bounds(size.rows, number, count)) for table, size, count in cuts for number in range(count)]
    loads, pieces = [0] * ranks, []
    for table, begin, end in sorted(parts, key=lambda part: (part[1] - part[2]) * sizes[part[0]].width):
        rank = loads.index(min(loads))
        loads[rank] += (end - begin) * sizes[table].width
        pieces.append(TablePiece(table, begin, end, rank))
    return sorted(pieces, key=lambda piece: (piece.table, piece.begin))


@dataclass(frozen=True)
class RowNumbers:
    """The numbers of rows of tables that travel together.

    Attributes:
        pieces: of the tables, by table and row.
        ranks: how many there are.
        mirrors: of each rank, whose rows it has as well; empty: each has its own only.
    """

    pieces: Sequence[TablePiece]
    ranks: int
    mirrors: Sequence[int] = ()

    @cached_property
    def first_numbers(self) -> dict[TablePiece, int]:
        """The number of each piece's first row."""
        found = {}
        for rank in range(self.ranks):
            for table in self._tables:
                number = self.bounds[rank] + self.held_slice(table, rank).start
                for piece in self.own_pieces(table, rank):
                    found[piece] = number
                    number += piece.end - piece.begin
        return found

    @cached_property
    def bounds(self) -> list[int]:
        """Where the numbers of each rank begin, (ranks + 1,)."""
        return [0, *accumulate(max(s.stop for s in self._slices[rank].values()) for rank in range(self.ranks))]

    @cached_property
    def _tables(self) -> list[int]:
        return sorted({piece.table for piece in self.pieces})

    @cached_property
    def _by_owner(self) -> dict[tuple[int, int], list[TablePiece]]:
        found: dict[tuple[int, int], list[TablePiece]] = {}
        for piece in self.pieces:
            found.setdefault((piece.table, piece.rank), []).append(piece)
        return found

    @cached_property
    def _slices(self) -> list[dict[int, slice]]:
        found = []
        for rank in range(self.ranks):
            ends = [0, *accumulate(count_piece_rows(self.held_pieces(table, rank)) for table in self._tables)]
            found.append({table: slice(*ends[i : i + 2]) for i, table in enumerate(self._tables)})
        return found

    def own_pieces(self, table: int, rank: int) -> list[TablePiece]:
        """Return a rank's pieces of a table, in the order of rows."""
        return self._by_owner.get((table, rank), [])

    def held_pieces(self, table: int, rank: int) -> list[TablePiece]:
        """Return a rank's pieces of a table, and those that it mirrors, in the order in which it has them."""
        others = self.own_pieces(table, self.mirrors[rank]) if self.mirrors else []
        return [*self.own_pieces(table, rank), *others]

    def held_slice(self, table: int, rank: int) -> slice:
        """Return which of the rows that a rank holds are a table's: its own, then those that it mirrors."""
        return self._slices[rank][table]

    def count_own(self, table: int, rank: int) -> int:
        """Return how many rows of a table are a rank's own."""
        return count_piece_rows(self.own_pieces(table, rank))


def count_piece_rows(pieces: Iterable[TablePiece]) -> int:
    """Return how many rows pieces have together."""
    return sum(piece.end - piece.begin for piece in pieces)
