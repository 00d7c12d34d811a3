"""The exchange of --deterministic: gradients of virtual shards, added in the order of one tree wherever they live.

Floating-point sums depend on their order, and an all-reduce's order on the ranks. Here the global batch is cut into
shards whose number does not depend on the ranks. Each shard's gradient is computed alone, and they are added as the
nodes of one binary tree say: first by each rank as far as its own shards go, then piece by piece of the gradient by
the rank whom the piece falls to. Bytes travel, sums do not, so that Horovod cannot change a bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvdtrain.collectives import ops
from hvdtrain.compression.spec import parse
from hvdtrain.data import order
from hvdtrain.torch.buckets import Named, check

# Gloo's all-to-all and all-gather are half as fast beyond some 4 MiB that a rank sends at once.
BLOCK_BYTES = 4 << 20

Node = tuple[int, int]  # the first shard of a range and the one behind its last


def tree(first: int, end: int) -> set[Node]:
    """The nodes of the tree over a range of shards: the range itself, and those of its two halves."""
    if end - first < 2:
        return {(first, end)}
    middle = (first + end + 1) // 2
    return {(first, end)} | tree(first, middle) | tree(middle, end)


@dataclass
class Partial:
    """The sum of a node's shards, or of a piece of their gradients."""

    node: Node
    total: Tensor


def push(stack: list[Partial], partial: Partial, nodes: set[Node]) -> None:
    """Put a sum on top of those to its left; two halves of a node become one, added in place."""
    stack.append(partial)
    # Nodes that together make a node are its two halves: there is no other way to cut it in two nodes.
    while len(stack) > 1 and (joint := (stack[-2].node[0], stack[-1].node[1])) in nodes:
        right = stack.pop()
        stack[-1].node = joint
        stack[-1].total += right.total


def cover(first: int, end: int, nodes: set[Node]) -> list[Node]:
    """The nodes, from left to right, whose sums a rank that has these shards comes to alone."""
    stack: list[Partial] = []
    for shard in range(first, end):
        push(stack, Partial((shard, shard + 1), torch.empty(0)), nodes)
    return [partial.node for partial in stack]


def cut(sums: Sequence[Tensor], size: int) -> Tensor:
    """(size, sums, ceil(values / size)): for each rank, its piece of each sum; what is behind the end is 0."""
    values = len(sums[0])
    pieces = sums[0].new_zeros(size, len(sums), -(-values // size))
    for i, total in enumerate(sums):
        for row, piece in zip(pieces[:, i], torch.split(total, pieces.shape[2]), strict=False):
            row[: len(piece)] = piece
    return pieces


def add(pieces: Iterable[Tensor], nodes_of_pieces: Iterable[Node], nodes: set[Node]) -> Tensor:
    """The sum of all shards, of one piece of the gradient. pieces: of all ranks' sums, in the order of ranks."""
    stack: list[Partial] = []
    for node, piece in zip(nodes_of_pieces, pieces, strict=True):
        push(stack, Partial(node, piece), nodes)
    (whole,) = stack
    return whole.total


@dataclass(eq=False)
class Flat:
    """The parameters of one type and device, whose gradients travel as one flat tensor."""

    dtype: torch.dtype
    device: torch.device
    params: list[torch.nn.Parameter] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    stack: list[Partial] = field(default_factory=list)  # this rank's sums in this step
    sent: int = 0  # bytes in the last step
    received: int = 0

    def gradient(self) -> Tensor:
        """The parameters' gradients, one behind the other; zeros for those that have none."""
        pieces = []
        for p in self.params:
            if p.grad is None:
                pieces.append(torch.zeros(p.numel(), dtype=self.dtype, device=self.device))
            else:
                # Rows of a sparse gradient travel densely.
                dense = p.grad.to_dense() if p.grad.is_sparse else p.grad
                pieces.append(dense.reshape(-1).to(self.dtype))
        return torch.cat(pieces)


class ShardExchange:
    """Sums gradients over virtual shards and ranks: the same bits on every rank and on any number of ranks.

    A step is `begin`, a backward pass and `passed` for each micro-batch, and `finish`, which sets every `p.grad`. A
    parameter that no shard used keeps the gradient None; one that only some used counts as zero in the others.
    One rank alone adds in the same order, without Horovod.
    """

    advisor = None

    def __init__(self, named: Named, shards: int, group: ops.Group = None) -> None:
        named = [(name, p) for name, p in named if p.requires_grad]
        check(named, parse("none"))
        self.group, self.size = group, ops.size(group)
        self.waited = 0.0  # seconds that the last `finish` waited for communication
        self.wire_bytes = 0  # that this rank sent in the last step
        self.nodes = tree(0, shards)
        self.covers = [cover(*order.bounds(shards, rank, self.size), self.nodes) for rank in range(self.size)]
        self.own = range(*order.bounds(shards, ops.rank(group), self.size))
        self._left: list[int] = []  # backward passes until the end of each of this rank's shards that is not in
        flats: dict[tuple[torch.dtype, torch.device], Flat] = {}
        for name, p in named:
            # Half precision is added in float32: it would overflow, and lose what it need not.
            key = (torch.promote_types(p.dtype, torch.float32), p.device)
            flat = flats.setdefault(key, Flat(*key))
            flat.params.append(p)
            flat.names.append(name)
        self.flats = list(flats.values())
        self.params = [p for flat in self.flats for p in flat.params]
        # By how many shards each parameter was used, and by how many with a dense gradient; whole numbers, whose sum
        # over ranks does not depend on an order.
        self._used = torch.zeros(len(self.params), 2, dtype=torch.int64)

    @property
    def pending(self) -> bool:
        """Whether there are gradients of this rank that `finish` has not added up yet."""
        return bool(self._left) or any(flat.stack for flat in self.flats)

    def set_passes(self, passes: int) -> None:
        """Nothing: which backward pass ends a shard is said by `begin`."""

    def begin(self, passes: Sequence[int]) -> None:
        """passes: how many backward passes each of this rank's shards takes in this step; 0: it is empty."""
        assert len(passes) == len(self.own)
        self._left = list(passes)
        self._used.zero_()
        self._take_in()

    def passed(self) -> None:
        """A backward pass is over."""
        self._left[0] -= 1
        self._take_in()

    def _take_in(self) -> None:
        """Take in the gradients of the shard that has ended, if one has, and the empty ones that follow it."""
        while self._left and self._left[0] == 0:
            shard = self.own[-len(self._left)]
            for flat in self.flats:
                push(flat.stack, Partial((shard, shard + 1), flat.gradient()), self.nodes)
            self._used += torch.tensor(
                [[p.grad is not None, p.grad is not None and not p.grad.is_sparse] for p in self.params]
            ).view(-1, 2)
            for p in self.params:
                p.grad = None
            self._left.pop(0)

    def finish(self) -> None:
        """Add up all ranks' sums and set every gradient. All ranks call it once per step."""
        if self._left:
            raise RuntimeError(f"the step is exchanged, but {len(self._left)} shards of this rank have not ended")
        used = None
        if self.size > 1:
            used = ops.all_reduce_async_(self._used, "shards.used", group=self.group)
            if any(flat.device.type == "cuda" for flat in self.flats):
                # Waiting for the backward pass's kernels is compute, not communication.
                torch.cuda.current_stream().synchronize()
        begin = time.perf_counter()
        totals = [self._reduce(number, flat) for number, flat in enumerate(self.flats)]
        if used is not None:
            ops.wait(used)
            flags = ops.ring_bytes(self._used.numel() * self._used.element_size(), self.size)
            self.wire_bytes = flags + sum(flat.sent for flat in self.flats)
        self.waited = time.perf_counter() - begin
        uses = iter(self._used.tolist())
        for flat, total in zip(self.flats, totals, strict=True):
            flat.stack.clear()
            pieces = torch.split(total, [p.numel() for p in flat.params])
            for p, piece, (used_by, dense_by) in zip(flat.params, pieces, uses, strict=False):
                p.grad = shaped(piece, p, sparse=not dense_by) if used_by else None

    def _reduce(self, number: int, flat: Flat) -> Tensor:
        """The sum over all shards, on every rank."""
        if self.size == 1:
            (whole,) = flat.stack
            return whole.total
        values = sum(p.numel() for p in flat.params)
        # All first rounds are under way before any is waited for, and second rounds before other sums.
        starts = range(0, values, BLOCK_BYTES // flat.dtype.itemsize)
        blocks = [(start, min(start + starts.step, values)) for start in starts]
        flat.sent = flat.received = 0
        first_rounds = []
        for start, end in blocks:
            # A rank without shards sends nothing, and adds its piece all the same.
            sums = [partial.total[start:end] for partial in flat.stack]
            own = cut(sums, self.size) if sums else torch.empty(0, dtype=flat.dtype, device=flat.device)
            name = f"shards.{number}.{start}"
            first_rounds.append(ops.all_to_all_async(own.view(-1).view(torch.uint8), f"{name}.pieces", self.group))
        second_rounds = []
        all_nodes = [node for nodes in self.covers for node in nodes]
        for (start, _), handle in zip(blocks, first_rounds, strict=True):
            received = ops.wait(handle).view(flat.dtype).view(len(all_nodes), -1)
            total = add(received, all_nodes, self.nodes)
            width, others = total.numel() * total.element_size(), self.size - 1
            flat.sent += width * others * (len(flat.stack) + 1)
            flat.received += width * (len(all_nodes) - len(flat.stack) + others)
            name = f"shards.{number}.{start}"
            second_rounds.append(ops.all_gather_async(total.view(torch.uint8), f"{name}.totals", self.group))
        gathered = [ops.wait(handle).view(flat.dtype) for handle in second_rounds]
        return torch.cat([total[: end - start] for (start, end), total in zip(blocks, gathered, strict=True)])

    def report(self) -> list[dict[str, Any]]:
        """The flat gradients as they are sent, for people; the same keys as those of buckets."""
        return [
            {
                "parameters": len(flat.params),
                "values": sum(p.numel() for p in flat.params),
                "compression": "none",
                "bytes_sent": flat.sent,
                "bytes_received": flat.received,
            }
            for flat in self.flats
        ]


def shaped(piece: Tensor, p: torch.nn.Parameter, sparse: bool) -> Tensor:
    """A parameter's part of a flat gradient, as the parameter is laid out in memory."""
    gradient = piece.view(p.shape).to(p.dtype)
    if sparse:  # optimizers for sparse gradients take no others
        return gradient.to_sparse(1)
    return gradient if p.is_contiguous() else torch.empty_like(p).copy_(gradient)
