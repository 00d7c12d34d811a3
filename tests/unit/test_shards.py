"""The tree in whose order virtual shards are added: the same bits wherever the shards live."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvdtrain.exchange.summation_tree import (
    Node,
    PartialSum,
    add_pieces,
    covering_nodes,
    push_partial,
    split_for_ranks,
    tree_nodes,
)
from hvdtrain.recipe import order


def by_recursion(gradients: list[Tensor]) -> Tensor:
    """The tree in so many words: the left half is the larger one."""
    if len(gradients) == 1:
        return gradients[0]
    middle = (len(gradients) + 1) // 2
    return by_recursion(gradients[:middle]) + by_recursion(gradients[middle:])


def balanced(first: int, end: int, nodes: set[Node]) -> bool:
    if end - first == 1:
        return (first, end) in nodes
    return (first, end) in nodes and any(
        balanced(first, middle, nodes) and balanced(middle, end, nodes) for middle in range(first + 1, end)
    )


@settings(max_examples=200, deadline=None)
@given(shards=st.integers(1, 32), size=st.integers(1, 10), values=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_any_number_of_ranks_adds_to_the_same_bits(shards: int, size: int, values: int, seed: int) -> None:
    """Ranks by themselves, an all-to-all of pieces, and an all-gather; all as Horovod would move them."""
    made = torch.Generator().manual_seed(seed)
    gradients = list(torch.randn(shards, values, generator=made) * 10 ** torch.randn(shards, 1, generator=made))
    nodes = tree_nodes(0, shards)
    covers, sent = [], []
    for rank in range(size):
        own = range(*order.part_bounds(shards, rank, size))
        stack: list[PartialSum] = []
        for shard in own:
            push_partial(stack, PartialSum((shard, shard + 1), gradients[shard].clone()), nodes)
        covers.append(covering_nodes(own.start, own.stop, nodes))
        assert [partial.node for partial in stack] == covers[-1]
        sums = [partial.total for partial in stack]
        sent.append(split_for_ranks(sums, size) if sums else torch.empty(size, 0, -(-values // size)))
    all_nodes = [node for nodes_of_rank in covers for node in nodes_of_rank]
    received = [torch.cat([pieces[rank] for pieces in sent]) for rank in range(size)]
    gathered = torch.cat([add_pieces(pieces, all_nodes, nodes) for pieces in received])
    assert torch.equal(gathered[:values].view(torch.int32), by_recursion(gradients).view(torch.int32))
    assert not gathered[values:].any()


@given(shards=st.integers(1, 32))
def test_the_tree_is_binary_and_flat(shards: int) -> None:
    nodes = tree_nodes(0, shards)
    assert len(nodes) == 2 * shards - 1
    assert balanced(0, shards, nodes)


@given(shards=st.integers(1, 32), first=st.integers(0, 32), end=st.integers(0, 32))
def test_a_cover_is_of_the_largest_nodes(shards: int, first: int, end: int) -> None:
    first, end = sorted((min(first, shards), min(end, shards)))
    nodes = tree_nodes(0, shards)
    inside = {node for node in nodes if first <= node[0] and node[1] <= end}
    largest = [a for a in inside if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in inside)]
    assert covering_nodes(first, end, nodes) == sorted(largest)


def test_the_order_of_addition_shows_in_the_bits() -> None:
    """So that the test above can fail."""
    gradients = list(torch.randn(12, 1000, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(by_recursion(gradients), torch.stack(gradients).sum(0))
