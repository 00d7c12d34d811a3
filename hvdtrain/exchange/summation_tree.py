"""The binary tree along which gradients of virtual shards are added: the same additions on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Node = tuple[int, int]  # the first shard of a range, and the one after its last


def tree_nodes(first: int, end: int) -> set[Node]:
    """Return the nodes of the tree over a range of shards: the range itself, and those of its two halves."""
    if end - first < 2:
        return {(first, end)}
    middle = (first + end + 1) // 2
    return {(first, end)} | tree_nodes(first, middle) | tree_nodes(middle, end)


@dataclass
class PartialSum:
    """The sum of a node's shards, or of a piece of their gradients."""

    node: Node
    total: Tensor


def push_partial(stack: list[PartialSum], partial: PartialSum, nodes: set[Node]) -> None:
    """Put a sum on top of those to its left; two halves of a node become one, added in place."""
    stack.append(partial)
    # Nodes that together make a node are its two halves: there is no other way to cut it in two nodes.
    while len(stack) > 1 and (joint := (stack[-2].node[0], stack[-1].node[1])) in nodes:
        right = stack.pop()
        stack[-1].node = joint
        stack[-1].total += right.total


def covering_nodes(first: int, end: int, nodes: set[Node]) -> list[Node]:
    """Return the nodes, from left to right, whose sums a rank that has these shards comes to alone."""
    stack: list[PartialSum] = []
    for shard in range(first, end):
        push_partial(stack, PartialSum((shard, shard + 1), torch.empty(0)), nodes)
    return [partial.node for partial in stack]


def split_for_ranks(sums: Sequence[Tensor], size: int) -> Tensor:
    """Return (size, sums, ceil(values / size)): for each rank, its piece of each sum; 0 after the end."""
    values = len(sums[0])
    pieces = sums[0].new_zeros(size, len(sums), -(-values // size))
    for i, total in enumerate(sums):
        for row, piece in zip(pieces[:, i], torch.split(total, pieces.shape[2]), strict=False):
            row[: len(piece)] = piece
    return pieces


def add_pieces(pieces: Iterable[Tensor], nodes_of_pieces: Iterable[Node], nodes: set[Node]) -> Tensor:
    """Return the sum over all shards of one piece of the gradient, (values,).

    Args:
        pieces: of all ranks' sums, in the order of ranks; they are overwritten.
        nodes_of_pieces: the shards that each piece is the sum of.
        nodes: of the tree.
    """
    stack: list[PartialSum] = []
    for node, piece in zip(nodes_of_pieces, pieces, strict=True):
        push_partial(stack, PartialSum(node, piece), nodes)
    (whole,) = stack
    return whole.total
