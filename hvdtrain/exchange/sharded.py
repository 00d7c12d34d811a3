"""The exchange of --deterministic: gradients of virtual shards, added in the order of one tree on any ranks.

Floating-point sums depend on their order, and an all-reduce's order on the ranks. Here the global batch is cut into
shards whose number does not depend on the ranks. Each shard's gradient is computed alone, and they are added along one
binary tree:

    shards        0   1   2   3   4   5        6 shards on 2 ranks: (0, 3) is rank 0's sum,
    nodes        (0, 2) 2  (3, 5) 5            (3, 6) rank 1's
                   (0, 3)    (3, 6)
                        (0, 6)                 added by the rank that a piece of the gradient belongs to

Each rank adds its own shards as far as they make nodes. Then the sums are cut into as many pieces as ranks; an
all-to-all brings each piece to its rank, which adds the rest of the tree, and an all-gather brings it to all. Bytes
travel, and Horovod adds nothing, so that it cannot change a bit. Like the other exchange, it knows no optimizer.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.spec import NONE, parse_compression
from hvdtrain.exchange.buckets import real_numel
from hvdtrain.exchange.layout import BucketReport, agree_on_newcomers, describe_parameter
from hvdtrain.exchange.parameter_checks import check_dtype, check_parameters
from hvdtrain.exchange.partition import NamedParameters
from hvdtrain.exchange.summation_tree import (
    PartialSum,
    add_pieces,
    covering_nodes,
    push_partial,
    split_for_ranks,
    tree_nodes,
)
from hvdtrain.recipe import order
from hvdtrain.recipe.shares import Shares, even_shares

# Gloo's all-to-all and all-gather are half as fast beyond some 4 MiB that a rank sends at once.
BLOCK_BYTES = 4 << 20


@dataclass(eq=False)
class FlatGradient:
    """The parameters of one type and device that are used now; their gradients travel as one flat tensor."""

    dtype: torch.dtype
    device: torch.device
    params: list[torch.nn.Parameter] = field(default_factory=list)
    param_set: set[torch.nn.Parameter] = field(default_factory=set)  # the same
    stack: list[PartialSum] = field(default_factory=list)  # this rank's sums in this step
    sent_bytes: int = 0  # bytes in the last step
    received_bytes: int = 0

    def join_gradients(self) -> Tensor:
        """Return the parameters' gradients, one after the other; zeros for those that have none."""
        pieces = [torch.zeros(0, dtype=self.dtype, device=self.device)]
        for p in self.params:
            if p.grad is None:
                pieces.append(torch.zeros(real_numel(p), dtype=self.dtype, device=self.device))
            else:
                # Rows of a sparse gradient travel densely.
                dense = p.grad.to_dense() if p.grad.is_sparse else p.grad
                if dense.is_complex():
                    dense = torch.view_as_real(dense.resolve_conj())
                pieces.append(dense.reshape(-1).to(self.dtype))
        return torch.cat(pieces)

    def set_params(self, params: list[torch.nn.Parameter]) -> None:
        """Let the sums be of these parameters: zeros for new ones; others are left out."""
        if len(params) == len(self.params) and all(map(operator.is_, params, self.params)):
            return
        for partial in self.stack:
            pieces = dict(
                zip(self.params, torch.split(partial.total, [real_numel(p) for p in self.params]), strict=True)
            )
            new = [pieces[p] if p in pieces else partial.total.new_zeros(real_numel(p)) for p in params]
            partial.total = torch.cat([partial.total[:0], *new])
        self.params, self.param_set = params, set(params)


class ShardedExchange:
    """Sums gradients over virtual shards and ranks: the same bits on every rank and on any number of ranks.

    A step is `start_exchange`, a backward pass and `end_backward_pass` for each micro-batch, and `finish_exchange`,
    which sets every `p.grad`. A parameter that no shard used keeps the gradient None; one that only some used counts as
    zero in the others. Only the parameters that some shard has used in this step are sent: they may be frozen and
    trained at any time. One rank alone adds in the same order, without Horovod.

    Attributes:
        waited: seconds that the last `finish_exchange` waited for communication.
        wire_bytes: bytes that this rank sent in the last step.
        checks_finite: whether `finish_exchange` looks if all sums are finite.
        sums_are_finite: what it saw in the last step; the same on all ranks.
        nodes_by_rank: of the tree, whose sums each rank computes alone.
        own_shards: of this rank.
    """

    advisor = None

    def __init__(self, named: NamedParameters, shards: int, group: collectives.Group = None, name: str = "") -> None:
        """Prepare the exchange, on all ranks.

        Args:
            named: names, the same on all ranks, and parameters.
            shards: virtual shards of the global batch.
            group: the ranks; None: all.
            name: before those of its collectives.
        """
        check_parameters(named, parse_compression(NONE))
        self.group, self.size, self.collective_name = group, collectives.size(group), f"{name}shards"
        self.waited = 0.0
        self.wire_bytes = 0
        self.checks_finite = False
        self.sums_are_finite = True
        self.num_shards, self.nodes = shards, tree_nodes(0, shards)
        self.deal_shards(even_shares(self.size))
        self._passes_left: list[int] = []  # backward passes until the end of each of this rank's shards that is not in
        self.flats: dict[tuple[torch.dtype, torch.device], FlatGradient] = {}
        self.names: dict[torch.nn.Parameter, str] = {}
        self._agreed_params = [
            p for _, p in named
        ]  # those that all ranks know, in the same order; others have been added
        # By how many of this rank's shards each parameter was used, and by how many with a dense gradient.
        self._use_counts: dict[torch.nn.Parameter, list[int]] = {}
        for name, p in named:
            self.add_parameter(name, p)

    def add_parameter(self, name: str, p: torch.nn.Parameter) -> None:
        """Add a parameter, on all ranks; when its first gradient comes, the ranks' values must be equal."""
        check_dtype(name, p)
        self.names[p], self._use_counts[p] = name, [0, 0]
        self._get_flat(p)

    def deal_shards(self, shares: Shares) -> None:
        """Deal the shards to the ranks by these shares, between two steps, on all ranks; at first they are even."""
        bounds = [order.share_bounds(self.num_shards, rank, shares) for rank in range(self.size)]
        self.nodes_by_rank = [covering_nodes(*of_rank, self.nodes) for of_rank in bounds]
        self.own_shards = range(*bounds[collectives.rank(self.group)])

    def discard_gradients(self) -> None:
        """Drop the gradients that have come since the last `finish_exchange`."""
        self._passes_left.clear()
        for flat in self.flats.values():
            flat.stack.clear()

    @property
    def has_pending_gradients(self) -> bool:
        """Whether there are gradients of this rank that `finish_exchange` has not added up yet."""
        return bool(self._passes_left) or any(flat.stack for flat in self.flats.values())

    def start_exchange(self, passes: Sequence[int]) -> None:
        """Start a step.

        Args:
            passes: how many backward passes each of this rank's shards takes in this step; 0: it is empty.
        """
        assert len(passes) == len(self.own_shards)
        self._passes_left = list(passes)
        self._use_counts = {p: [0, 0] for p in self.names}
        self._add_finished_shards()

    def end_backward_pass(self) -> None:
        """Note that a backward pass is over."""
        self._passes_left[0] -= 1
        self._add_finished_shards()

    def _get_flat(self, p: torch.nn.Parameter) -> FlatGradient:
        # Half precision is added in float32: it would overflow, and lose what it need not.
        key = (torch.promote_types(p.dtype.to_real(), torch.float32), p.device)
        if key not in self.flats:
            nodes = next((flat.stack for flat in self.flats.values()), [])  # of the shards that are in already
            stack = [PartialSum(partial.node, torch.zeros(0, dtype=key[0], device=p.device)) for partial in nodes]
            self.flats[key] = FlatGradient(*key, stack=stack)
        return self.flats[key]

    def _add_finished_shards(self) -> None:
        """Take in the gradients of the shard that has ended, if one has, and the empty ones that follow it."""
        while self._passes_left and self._passes_left[0] == 0:
            shard = self.own_shards[-len(self._passes_left)]
            for p in self.names:
                if p.grad is not None:
                    self._use_counts[p][0] += 1
                    self._use_counts[p][1] += not p.grad.is_sparse
                    flat = self._get_flat(p)
                    if p not in flat.param_set:
                        flat.set_params([*flat.params, p])
            for flat in self.flats.values():
                push_partial(flat.stack, PartialSum((shard, shard + 1), flat.join_gradients()), self.nodes)
            for p in self.names:
                p.grad = None
            self._passes_left.pop(0)

    def finish_exchange(self) -> None:
        """Add up all ranks' sums and set every gradient. All ranks call it once per step."""
        if self._passes_left:
            raise RuntimeError(
                f"the step is exchanged, but {len(self._passes_left)} shards of this rank have not ended"
            )
        if self.size > 1 and any(flat.device.type == "cuda" for flat in self.flats.values()):
            torch.cuda.current_stream().synchronize()  # waiting for the backward pass is compute, not communication
        begin = time.perf_counter()
        uses = self._agree_on_uses()
        used = {p: dense for p, (count, dense) in zip(self._agreed_params, uses, strict=True) if count}
        for flat in self.flats.values():
            flat.set_params([p for p in used if self._get_flat(p) is flat])
        flats = [self.flats[key] for key in sorted(self.flats, key=str)]
        for p in self.names:
            p.grad = None
        totals = [self._reduce_flat(number, flat) for number, flat in enumerate(flats)]
        self.waited = time.perf_counter() - begin
        if self.size > 1:
            self.wire_bytes = collectives.ring_all_reduce_bytes(16 * (len(self._agreed_params) + 1), self.size) + sum(
                flat.sent_bytes for flat in flats
            )
        if self.checks_finite:
            self.sums_are_finite = all(bool(torch.isfinite(total.sum())) for total in totals)
        for flat, total in zip(flats, totals, strict=True):
            for p, piece in zip(flat.params, torch.split(total, [real_numel(p) for p in flat.params]), strict=True):
                p.grad = shape_gradient(piece, p, sparse=not used[p])
            flat.stack.clear()

    def _agree_on_uses(self) -> list[list[int]]:
        """By how many shards, and with a dense gradient, each agreed parameter was used on all ranks together."""
        agreed = set(self._agreed_params)
        added = [p for p in self.names if p not in agreed]
        counts = [self._use_counts[p] for p in self._agreed_params]
        # Whole numbers, whose sum over ranks does not depend on an order.
        uses = self._sum_counts(
            [*counts, [any(self._use_counts[p][0] for p in added), 0]], f"{self.collective_name}.used"
        )
        if uses.pop()[0]:
            arrived = [self.names[p] for p in added if self._use_counts[p][0]]
            known = {name: describe_parameter(p, values=p not in agreed) for p, name in self.names.items()}
            names = agree_on_newcomers(arrived, [], known, self.group)
            newcomers = [p for name in names for p in added if self.names[p] == name]
            uses += self._sum_counts([self._use_counts[p] for p in newcomers], f"{self.collective_name}.newcomers")
            self._agreed_params += newcomers
        return uses

    def _sum_counts(self, counts: list[list[int]], name: str) -> list[list[int]]:
        if self.size == 1:
            return counts
        summed = collectives.wait(
            collectives.all_reduce_async_(torch.tensor(counts, dtype=torch.int64), name, group=self.group)
        )
        return summed.tolist()

    def _reduce_flat(self, number: int, flat: FlatGradient) -> Tensor:
        """Return the sum over all shards, on every rank."""
        if self.size == 1 or not flat.params:
            return flat.stack[0].total if flat.stack else torch.zeros(0, dtype=flat.dtype)
        values = sum(map(real_numel, flat.params))
        # All first rounds are under way before any is waited for, and second rounds before other sums.
        starts = range(0, values, BLOCK_BYTES // flat.dtype.itemsize)
        blocks = [(start, min(start + starts.step, values)) for start in starts]
        flat.sent_bytes = flat.received_bytes = 0
        first_rounds = []
        for start, end in blocks:
            # A rank without shards sends nothing, and adds its piece all the same.
            sums = [partial.total[start:end] for partial in flat.stack]
            own = split_for_ranks(sums, self.size) if sums else torch.empty(0, dtype=flat.dtype, device=flat.device)
            name = f"{self.collective_name}.{number}.{start}"
            first_rounds.append(
                collectives.all_to_all_async(own.view(-1).view(torch.uint8), f"{name}.pieces", self.group)
            )
        second_rounds = []
        all_nodes = [node for nodes in self.nodes_by_rank for node in nodes]
        for (start, _), handle in zip(blocks, first_rounds, strict=True):
            received = collectives.wait(handle).view(flat.dtype).view(len(all_nodes), -1)
            total = add_pieces(received, all_nodes, self.nodes)
            size, others = total.numel() * total.element_size(), self.size - 1
            flat.sent_bytes += size * others * (len(flat.stack) + 1)
            flat.received_bytes += size * (len(all_nodes) - len(flat.stack) + others)
            name = f"{self.collective_name}.{number}.{start}"
            second_rounds.append(collectives.all_gather_async(total.view(torch.uint8), f"{name}.totals", self.group))
        gathered = [collectives.wait(handle).view(flat.dtype) for handle in second_rounds]
        return torch.cat([total[: end - start] for (start, end), total in zip(blocks, gathered, strict=True)])

    def describe_buckets(self) -> list[BucketReport]:
        """Return the flat gradients as they are sent."""
        reports = []
        for flat in self.flats.values():
            if flat.params:
                values = sum(p.numel() for p in flat.params)
                reports.append(BucketReport(len(flat.params), values, NONE, flat.sent_bytes, flat.received_bytes))
        return reports


def shape_gradient(piece: Tensor, p: torch.nn.Parameter, sparse: bool) -> Tensor:
    """Return a parameter's part of a flat gradient, as the parameter is laid out in memory."""
    if p.is_complex():
        piece = torch.view_as_complex(piece.clone().view(-1, 2))
    gradient = piece.view(p.shape).to(p.dtype)
    if sparse:  # optimizers for sparse gradients take no others
        return gradient.to_sparse(1)
    return gradient if p.is_contiguous() else torch.empty_like(p).copy_(gradient)
