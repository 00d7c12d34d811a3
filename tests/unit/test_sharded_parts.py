"""Whose part a rank mirrors, and which rank sends what of a sharded state to whom in a new world."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hvdtrain.exchange.partition import Partition, assign_mirrors
from hvdtrain.torch.held_parts import AVERAGE, HeldPart, Interval, find_sources, join_parts, name_lost_ranks
from hvdtrain.torch.pieces import Piece, ShardedBucket

HOSTS = st.lists(st.sampled_from("abcd"), min_size=2, max_size=16)

STATE = "the optimizer's state"


@given(HOSTS)
def test_each_rank_mirrors_one_other_and_as_many_as_possible_one_on_another_host(hosts: list[str]) -> None:
    mirrors = assign_mirrors(hosts)
    assert sorted(mirrors) == list(range(len(hosts)))
    assert all(mirrored != rank for rank, mirrored in enumerate(mirrors))
    most = max(Counter(hosts).values())
    apart = sum(hosts[rank] != hosts[mirrored] for rank, mirrored in enumerate(mirrors))
    assert apart == min(len(hosts), 2 * (len(hosts) - most))


def test_ranks_of_one_host_mirror_the_next_one() -> None:
    assert assign_mirrors(["a"] * 3) == [1, 2, 0]
    assert assign_mirrors(["a", "a", "b", "b"]) == [2, 3, 0, 1]
    assert assign_mirrors(["a", "b", "a", "b"]) == [1, 0, 3, 2]


def make_buckets(size: int, params: list[nn.Parameter]) -> list[ShardedBucket]:
    """One bucket as each of `size` ranks has it, mirrored."""
    partition = Partition(size, "elements", assign_mirrors(["a"] * size) if size > 1 else [])
    widths = [p.numel() for p in params]
    _, bounds = partition.cut_bucket([(str(i), p) for i, p in enumerate(params)], widths)
    return [ShardedBucket(params, bounds, partition, rank) for rank in range(size)]


@given(
    old=st.integers(1, 6),
    new=st.integers(1, 6),
    lost=st.sets(st.integers(0, 5)),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_states_come_together_on_other_ranks_unless_a_part_and_its_mirror_are_lost(
    old: int, new: int, lost: set[int], sizes: list[int]
) -> None:
    """A state of each value's number: every piece of the new world has its own."""
    params = [nn.Parameter(torch.zeros(n)) for n in sizes]
    names = {p: str(i) for i, p in enumerate(params)}
    left = [bucket for bucket in make_buckets(old, params) if bucket.rank not in lost]
    held: dict[int, list[HeldPart]] = {}
    for rank, bucket in enumerate(left[:new]):
        for piece, _ in bucket.held:
            numbers = torch.arange(piece.start, piece.end)
            state = {"sum": 100 * int(names[piece.param]) + numbers, "step": torch.tensor(3.0)}
            held.setdefault(rank, []).append(HeldPart(names[piece.param], piece, state, None, 0.5 * numbers))
    is_there = set()
    for bucket in left[:new]:
        is_there |= {bucket.rank, *bucket.partition.mirrors[bucket.rank : bucket.rank + 1]}
    lengths = [sum(piece.num_reals for piece in left[0].list_pieces(part)) for part in range(old)] if left else [1]
    is_complete = bool(left) and all(part in is_there or not lengths[part] for part in range(old))
    missing = False
    for bucket in make_buckets(new, params):
        for piece, _ in bucket.held:
            name = names[piece.param]
            parts = [(rank, part) for rank, own in held.items() for part in own if part.name == name]
            holders = [Interval(rank, part.piece.start, part.piece.end) for rank, part in parts]
            sources = find_sources(holders, piece, bucket.rank)
            if sources is None:
                missing = True
                continue
            cut = []
            for interval in sources:
                part = next(part for rank, part in parts if rank == interval.rank and part.contains(interval))
                cut.append((interval.end - interval.start, part.cut_state(interval.start, interval.end)))
            joined, expected = join_parts(cut), torch.arange(piece.start, piece.end)
            assert torch.equal(joined["sum"], 100 * int(name) + expected)
            assert torch.equal(joined[AVERAGE], 0.5 * expected)
            assert joined["step"] == 3.0
    assert missing != is_complete


def test_cut_states_share_no_memory() -> None:
    """Pieces that are cut from one part count their steps each for itself."""
    p = nn.Parameter(torch.zeros(4))
    part = HeldPart("p", Piece(p, 0, 4, whole=False), {"step": torch.tensor(1.0), "sum": torch.ones(4)}, None, None)
    one, other = part.cut_state(0, 2), part.cut_state(0, 2)
    one["step"] += 1
    one["sum"] += 1
    assert other["step"] == 1 and other["sum"].tolist() == [1, 1]


def test_lost_parts_are_named_by_the_ranks_that_had_them() -> None:
    assert name_lost_ranks([(4, [0, 1])], STATE) == "the optimizer's state of ranks 2, 3 and their mirrors are gone"
    assert name_lost_ranks([(3, [0, 1])], STATE) == "the optimizer's state of rank 2 and its mirror are gone"
    assert (
        name_lost_ranks([(3, [0, 1]), (3, [1, 2])], STATE)
        == "parts of the optimizer's state and their mirrors are gone"
    )
    assert name_lost_ranks([], STATE) == "parts of the optimizer's state and their mirrors are gone"
