"""The exchange of --deterministic: gradients of virtual shards, added in the order of one tree wherever they live.

Floating-point sums depend on their order, and an all-reduce's order on the ranks. Here the global batch is cut into
shards whose number does not depend on the ranks. Each shard's gradient is computed alone, and they are added as the
nodes of one binary tree say: first by each rank as far as its own shards go, then piece by piece of the gradient by
the rank whom the piece falls to. Bytes travel, sums do not, so that Horovod cannot change a bit.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.spec import parse
from hvdtrain.exchange.buckets import Named, check, check_dtype, width
from hvdtrain.exchange.layout import agree_on_newcomers, describe
from hvdtrain.recipe import order

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
    """The parameters of one type and device that are used now; their gradients travel as one flat tensor."""

    dtype: torch.dtype
    device: torch.device
    params: list[torch.nn.Parameter] = field(default_factory=list)
    held: set[torch.nn.Parameter] = field(default_factory=set)  # the same
    stack: list[Partial] = field(default_factory=list)  # this rank's sums in this step
    sent: int = 0  # bytes in the last step
    received: int = 0

    def gradient(self) -> Tensor:
        """The parameters' gradients, one after the other; zeros for those that have none."""
        pieces = [torch.zeros(0, dtype=self.dtype, device=self.device)]
        for p in self.params:
            if p.grad is None:
                pieces.append(torch.zeros(width(p), dtype=self.dtype, device=self.device))
            else:
                # Rows of a sparse gradient travel densely.
                dense = p.grad.to_dense() if p.grad.is_sparse else p.grad
                if dense.is_complex():
                    dense = torch.view_as_real(dense.resolve_conj())
                pieces.append(dense.reshape(-1).to(self.dtype))
        return torch.cat(pieces)

    def hold(self, params: list[torch.nn.Parameter]) -> None:
        """Let the sums be of these parameters: zeros for new ones; others are left out."""
        if len(params) == len(self.params) and all(map(operator.is_, params, self.params)):
            return
        for partial in self.stack:
            pieces = dict(zip(self.params, torch.split(partial.total, [width(p) for p in self.params]), strict=True))
            new = [pieces[p] if p in pieces else partial.total.new_zeros(width(p)) for p in params]
            partial.total = torch.cat([partial.total[:0], *new])
        self.params, self.held = params, set(params)


class ShardExchange:
    """Sums gradients over virtual shards and ranks: the same bits on every rank and on any number of ranks.

    A step is `begin`, a backward pass and `passed` for each micro-batch, and `finish`, which sets every `p.grad`. A
    parameter that no shard used keeps the gradient None; one that only some used counts as zero in the others.
    What travels are the parameters that some shard has used in this step: they may be frozen and trained at any time.
    One rank alone adds in the same order, without Horovod.
    """

    advisor = None

    def __init__(self, named: Named, shards: int, group: collectives.Group = None) -> None:
        check(named, parse("none"))
        self.group, self.size = group, collectives.size(group)
        self.waited = 0.0  # seconds that the last `finish` waited for communication
        self.wire_bytes = 0  # that this rank sent in the last step
        self.checks_finite = False  # whether `finish` looks if all sums are finite
        self.finite = True  # what it saw in the last step; the same on all ranks
        self.nodes = tree(0, shards)
        self.covers = [cover(*order.bounds(shards, rank, self.size), self.nodes) for rank in range(self.size)]
        self.own = range(*order.bounds(shards, collectives.rank(group), self.size))
        self._left: list[int] = []  # backward passes until the end of each of this rank's shards that is not in
        self.flats: dict[tuple[torch.dtype, torch.device], Flat] = {}
        self.names: dict[torch.nn.Parameter, str] = {}
        self._agreed = [p for _, p in named]  # those that all ranks know, in the same order; others have been added
        # By how many of this rank's shards each parameter was used, and by how many with a dense gradient.
        self._uses: dict[torch.nn.Parameter, list[int]] = {}
        for name, p in named:
            self.add(name, p)

    def add(self, name: str, p: torch.nn.Parameter) -> None:
        """Take in another parameter, on all ranks; where its first gradient comes, the ranks' values must be equal."""
        check_dtype(name, p)
        self.names[p], self._uses[p] = name, [0, 0]
        self._flat_of(p)

    def forget(self) -> None:
        """Drop the gradients that have come since the last `finish`."""
        self._left.clear()
        for flat in self.flats.values():
            flat.stack.clear()

    @property
    def pending(self) -> bool:
        """Whether there are gradients of this rank that `finish` has not added up yet."""
        return bool(self._left) or any(flat.stack for flat in self.flats.values())

    def begin(self, passes: Sequence[int]) -> None:
        """Start a step.

        Args:
            passes: how many backward passes each of this rank's shards takes in this step; 0: it is empty.
        """
        assert len(passes) == len(self.own)
        self._left = list(passes)
        self._uses = {p: [0, 0] for p in self.names}
        self._take_in()

    def passed(self) -> None:
        """A backward pass is over."""
        self._left[0] -= 1
        self._take_in()

    def _flat_of(self, p: torch.nn.Parameter) -> Flat:
        # Half precision is added in float32: it would overflow, and lose what it need not.
        key = (torch.promote_types(p.dtype.to_real(), torch.float32), p.device)
        if key not in self.flats:
            nodes = next((flat.stack for flat in self.flats.values()), [])  # of the shards that are in already
            stack = [Partial(partial.node, torch.zeros(0, dtype=key[0], device=p.device)) for partial in nodes]
            self.flats[key] = Flat(*key, stack=stack)
        return self.flats[key]

    def _take_in(self) -> None:
        """Take in the gradients of the shard that has ended, if one has, and the empty ones that follow it."""
        while self._left and self._left[0] == 0:
            shard = self.own[-len(self._left)]
            for p in self.names:
                if p.grad is not None:
                    self._uses[p][0] += 1
                    self._uses[p][1] += not p.grad.is_sparse
                    flat = self._flat_of(p)
                    if p not in flat.held:
                        flat.hold([*flat.params, p])
            for flat in self.flats.values():
                push(flat.stack, Partial((shard, shard + 1), flat.gradient()), self.nodes)
            for p in self.names:
                p.grad = None
            self._left.pop(0)

    def finish(self) -> None:
        """Add up all ranks' sums and set every gradient. All ranks call it once per step."""
        if self._left:
            raise RuntimeError(f"the step is exchanged, but {len(self._left)} shards of this rank have not ended")
        if self.size > 1 and any(flat.device.type == "cuda" for flat in self.flats.values()):
            torch.cuda.current_stream().synchronize()  # waiting for the backward pass is compute, not communication
        begin = time.perf_counter()
        uses = self._agree_on_uses()
        used = {p: dense for p, (count, dense) in zip(self._agreed, uses, strict=True) if count}
        for flat in self.flats.values():
            flat.hold([p for p in used if self._flat_of(p) is flat])
        flats = [self.flats[key] for key in sorted(self.flats, key=str)]
        for p in self.names:
            p.grad = None
        totals = [self._reduce(number, flat) for number, flat in enumerate(flats)]
        self.waited = time.perf_counter() - begin
        if self.size > 1:
            self.wire_bytes = collectives.ring_bytes(16 * (len(self._agreed) + 1), self.size) + sum(
                flat.sent for flat in flats
            )
        if self.checks_finite:
            self.finite = all(bool(torch.isfinite(total.sum())) for total in totals)
        for flat, total in zip(flats, totals, strict=True):
            for p, piece in zip(flat.params, torch.split(total, [width(p) for p in flat.params]), strict=True):
                p.grad = shaped(piece, p, sparse=not used[p])
            flat.stack.clear()

    def _agree_on_uses(self) -> list[list[int]]:
        """By how many shards, and with a dense gradient, each agreed parameter was used on all ranks together."""
        agreed = set(self._agreed)
        added = [p for p in self.names if p not in agreed]
        counts = [self._uses[p] for p in self._agreed]
        # Whole numbers, whose sum over ranks does not depend on an order.
        uses = self._sum([*counts, [any(self._uses[p][0] for p in added), 0]], "shards.used")
        if uses.pop()[0]:
            arrived = [self.names[p] for p in added if self._uses[p][0]]
            known = {name: describe(p, values=p not in agreed) for p, name in self.names.items()}
            names = agree_on_newcomers(arrived, [], known, self.group)
            newcomers = [p for name in names for p in added if self.names[p] == name]
            uses += self._sum([self._uses[p] for p in newcomers], "shards.newcomers")
            self._agreed += newcomers
        return uses

    def _sum(self, counts: list[list[int]], name: str) -> list[list[int]]:
        if self.size == 1:
            return counts
        summed = collectives.wait(
            collectives.all_reduce_async_(torch.tensor(counts, dtype=torch.int64), name, group=self.group)
        )
        return summed.tolist()

    def _reduce(self, number: int, flat: Flat) -> Tensor:
        """The sum over all shards, on every rank."""
        if self.size == 1 or not flat.params:
            return flat.stack[0].total if flat.stack else torch.zeros(0, dtype=flat.dtype)
        values = sum(map(width, flat.params))
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
            first_rounds.append(
                collectives.all_to_all_async(own.view(-1).view(torch.uint8), f"{name}.pieces", self.group)
            )
        second_rounds = []
        all_nodes = [node for nodes in self.covers for node in nodes]
        for (start, _), handle in zip(blocks, first_rounds, strict=True):
            received = collectives.wait(handle).view(flat.dtype).view(len(all_nodes), -1)
            total = add(received, all_nodes, self.nodes)
            size, others = total.numel() * total.element_size(), self.size - 1
            flat.sent += size * others * (len(flat.stack) + 1)
            flat.received += size * (len(all_nodes) - len(flat.stack) + others)
            name = f"shards.{number}.{start}"
            second_rounds.append(collectives.all_gather_async(total.view(torch.uint8), f"{name}.totals", self.group))
        gathered = [collectives.wait(handle).view(flat.dtype) for handle in second_rounds]
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
            for flat in self.flats.values()
            if flat.params
        ]


def shaped(piece: Tensor, p: torch.nn.Parameter, sparse: bool) -> Tensor:
    """A parameter's part of a flat gradient, as the parameter is laid out in memory."""
    if p.is_complex():
        piece = torch.view_as_complex(piece.clone().view(-1, 2))
    gradient = piece.view(p.shape).to(p.dtype)
    if sparse:  # optimizers for sparse gradients take no others
        return gradient.to_sparse(1)
    return gradient if p.is_contiguous() else torch.empty_like(p).copy_(gradient)
