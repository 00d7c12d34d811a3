"""Where rows of dealt tables are, and where their mirrors have them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.exchange.partition import assign_mirrors
from hvdtrain.torch.table_group import Mirror
from hvdtrain.torch.table_plan import RowNumbers, TablePiece, TableSize, deal_tables

SIZES = st.lists(st.builds(TableSize, st.integers(1, 40), st.just(4)), min_size=1, max_size=6)
HOSTS = st.lists(st.sampled_from("ab"), min_size=2, max_size=5)


def list_rows(pieces: list[TablePiece]) -> list[tuple[int, int]]:
    return [(piece.table, row) for piece in pieces for row in range(piece.begin, piece.end)]


@given(SIZES, HOSTS, st.booleans())
def test_each_row_has_its_place_with_its_owner_and_its_mirror(
    sizes: list[TableSize], hosts: list[str], mirrored: bool
) -> None:
    ranks = len(hosts)
    numbers = RowNumbers(deal_tables(sizes, ranks), ranks, assign_mirrors(hosts) if mirrored else [])
    held = [
        list_rows([piece for table in range(len(sizes)) for piece in numbers.held_pieces(table, rank)])
        for rank in range(ranks)
    ]
    every = [(table, row) for table, size in enumerate(sizes) for row in range(size.rows)]
    assert sorted(row for rows in held for row in rows) == sorted(every * (2 if mirrored else 1))
    for rank, rows in enumerate(held):
        assert numbers.bounds[rank + 1] - numbers.bounds[rank] == len(rows)
        for table in range(len(sizes)):
            own, place = numbers.own_pieces(table, rank), numbers.held_slice(table, rank)
            assert list_rows(own) == rows[place][: numbers.count_own(table, rank)]
            for piece in own:
                first = numbers.first_numbers[piece] - numbers.bounds[rank]
                assert rows[first : first + piece.end - piece.begin] == list_rows([piece])
                if mirrored:
                    mirror = Mirror.find(numbers, rank, torch.device("cpu"))
                    there = first + int(mirror.shifts[table])
                    assert held[mirror.rank][there : there + piece.end - piece.begin] == list_rows([piece])
