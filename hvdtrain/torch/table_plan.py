"""Which rows of embedding tables belong to which rank.

    table 0, rows 0 ... 9        [ rank 0 . . . . | rank 1 . . . . ]      larger than a share: cut by rows
    table 1                      [ rank 1 . . ]                           whole, with the rank that has least so far
    table 2                      [ rank 0 . ]

The rows of tables that travel together are numbered anew, by rank, table and row, so that the sorted numbers of a
lookup are sorted by the ranks that have them:

    rank 0: table 0, rows 0-4 | table 2      rank 1: table 0, rows 5-9 | table 1
            0 ... 4             5 6                  7 ... 11            12 13 14
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
    """

    pieces: Sequence[TablePiece]
    ranks: int

    @cached_property
    def first_numbers(self) -> dict[TablePiece, int]:
        """The number of each piece's first row."""
        found, number = {}, 0
        for piece in sorted(self.pieces, key=lambda piece: (piece.rank, piece.table, piece.begin)):
            found[piece] = number
            number += piece.end - piece.begin
        return found

    @cached_property
    def bounds(self) -> list[int]:
        """Where the numbers of each rank begin, (ranks + 1,)."""
        bounds = [0]
        for rank in range(self.ranks):
            bounds.append(bounds[-1] + sum(p.end - p.begin for p in self.pieces if p.rank == rank))
        return bounds

    def own_pieces(self, table: int, rank: int) -> list[TablePiece]:
        """Return a rank's pieces of a table, in the order of rows."""
        return [piece for piece in self.pieces if (piece.table, piece.rank) == (table, rank)]

    def own_slice(self, table: int, rank: int) -> slice:
        """Return which of a rank's own rows are a table's."""
        pieces = self.own_pieces(table, rank)
        begin = self.first_numbers[pieces[0]] - self.bounds[rank] if pieces else 0
        return slice(begin, begin + sum(piece.end - piece.begin for piece in pieces))
