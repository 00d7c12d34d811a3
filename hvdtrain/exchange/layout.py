"""Which parameters are exchanged, and in which buckets: agreed on by all ranks whenever it changes.

Knows parameters, and no optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from hvdtrain.comm import collectives
from hvdtrain.compression.hierarchical_reducer import HierarchicalReducer
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer
from hvdtrain.exchange.buckets import HEAD_SIZE, Bucket, ExchangeConfig, make_buckets
from hvdtrain.exchange.checksums import checksum_tensor
from hvdtrain.exchange.local_tensors import local_tensor
from hvdtrain.exchange.partition import Partition
from hvdtrain.system.errors import RunError

# After 10 steps in a row without a gradient, and after twice as many each time, the ranks agree whether a bucket is
# frozen. Not sooner: layers that are frozen and trained in turns should stay.
IDLE_CHECK_STEPS = {10 * 2**doubling for doubling in range(40)}


@dataclass(frozen=True)
class BucketReport:
    """A bucket as it is sent, for the run folder."""

    parameters: int
    values: int
    compression: str  # "none", "powersgd:4"
    bytes_sent: int  # by this rank in a step
    bytes_received: int


class BucketLayout:
    """The buckets of an exchange, some of which may be suspended, and the parameters that are in none that is sent.

        frozen, in no bucket --(a gradient on some rank)--> in a bucket --(frozen on all ranks)--> bucket suspended
                                                                ^                                       |
                                                                +-----(a gradient on some rank)---------+

    Buckets that exist stay as they are, and so do their residuals.
    """

    def __init__(self, config: ExchangeConfig) -> None:
        self.config, self.average, self.group = config, config.average, config.group
        self.size = collectives.size(config.group)
        self.steps = 0  # exchanged
        self.names: dict[torch.nn.Parameter, str] = {}
        self.new_params: set[torch.nn.Parameter] = set()  # later than the first, and in no bucket yet
        self.buckets: list[Bucket] = []
        self.pruned: Mapping[torch.nn.Parameter, torch.Tensor] = {}  # as `Bucket.leave_out` takes it
        # The names in the order in which buckets were made of them, for each time that buckets were made.
        self.build_orders: list[list[str]] = []
        self.locations: dict[torch.nn.Parameter, tuple[Bucket, int]] = {}  # only in buckets that are sent
        self.inactive_params: list[torch.nn.Parameter] = []  # all others
        # The head of a step, and after it the flags of the compressible buckets.
        self.flags = self.join_flags([])

    @property
    def active_buckets(self) -> list[Bucket]:
        """The buckets that are sent."""
        return [bucket for bucket in self.buckets if not bucket.suspended]

    @property
    def compressed_buckets(self) -> list[Bucket]:
        """The buckets that a codec carries."""
        return [bucket for bucket in self.buckets if isinstance(bucket.reducer, CompressedReducer)]

    def describe_buckets(self) -> list[BucketReport]:
        """Return the buckets as they are sent."""
        reports = []
        for bucket in self.buckets:
            values = sum(local_tensor(p).numel() for p in bucket.params)
            wire_bytes = 0 if bucket.suspended else bucket.reducer.wire_bytes  # rings are symmetric
            reports.append(BucketReport(len(bucket.params), values, bucket.method, wire_bytes, wire_bytes))
        return reports

    def build_buckets(self, order: Sequence[str]) -> list[Bucket]:
        """Make buckets of parameters that are in none, in this order of names, and return them."""
        by_name = {name: p for p, name in self.names.items()}
        there = {name for bucket in self.buckets for name in bucket.names}
        named = [(name, by_name[name]) for name in order if name in by_name and name not in there]
        made = make_buckets(named, self.config, first=len(self.buckets))
        for bucket in made:
            bucket.leave_out(self.pruned)
        self.buckets += made
        self.build_orders.append([name for name, _ in named])
        return made

    def leave_out(self, pruned: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Let gradients of pruned weights not travel from now on, on all ranks between steps (`Bucket.leave_out`)."""
        self.pruned = pruned
        for bucket in self.buckets:
            bucket.leave_out(pruned)

    def scatter_sums(self, partition: Partition, trained: Collection[str]) -> None:
        """From now on, bring each rank the sums of its part only; on all ranks, before the first step.

        trained: names of parameters that are, as far as is known.

        Buckets are made at once, since whoever has the parts needs them before a gradient has come: of what is trained,
        in the order in which backward finishes it as a rule, and of what is frozen. They are sent from the end of the
        first step on in which they are used: by then it is known whose gradients come in several parts.
        """
        self.config = replace(self.config, partition=partition)
        floating = [(name, p) for p, name in reversed(self.names.items()) if p.is_floating_point() or p.is_complex()]
        partition.assign_owners(p for _, p in floating)
        for is_trained in (True, False):
            for bucket in self.build_buckets([name for name, _ in floating if (name in trained) == is_trained]):
                bucket.suspended = True
        self.refresh_layout()

    def refresh_layout(self) -> None:
        """Set what depends on which buckets there are and which of them are sent."""
        self.locations = {p: (bucket, i) for bucket in self.active_buckets for i, p in enumerate(bucket.params)}
        self.inactive_params = [p for p in self.names if p not in self.locations]
        self.order_rounds(self.active_buckets)
        self.flags = self.join_flags(self.active_buckets)

    def order_rounds(self, buckets: Sequence[Bucket]) -> None:
        """Let these buckets be what is sent, on all ranks, if hosts encode their sums; between two exchanges."""
        if self.config.round_order is not None:
            reducers = [bucket.reducer for bucket in buckets if isinstance(bucket.reducer, HierarchicalReducer)]
            self.config.round_order.set_reducers(reducers)

    def join_flags(self, buckets: list[Bucket]) -> PlainReducer:
        """Join a head and compressible buckets' flags in one tensor; an empty one if heads travel in buckets."""
        compressible = [bucket for bucket in buckets if bucket.compressible]
        count = sum(len(bucket.params) for bucket in compressible) + HEAD_SIZE * bool(compressible or not buckets)
        flat = torch.zeros(count, device=compressible[0].flags.device if compressible else None)
        pieces = torch.split(flat[HEAD_SIZE:], [len(bucket.params) for bucket in compressible])
        for bucket, piece in zip(compressible, pieces, strict=True):
            bucket.flags = piece
        return PlainReducer(f"{self.config.name}gradients.flags", flat, average=False, group=self.group)

    def add_newcomers(self, arrived: Collection[torch.nn.Parameter]) -> list[Bucket]:
        """Agree with all ranks on the parameters to be exchanged from now on; return the buckets that they are in.

        Args:
            arrived: parameters in no bucket that is sent whose gradients have come, in that order, with quick `in`.
        """
        others = [p for p in reversed(self.inactive_params) if expects_gradient(p) and p not in arrived]
        known = {name: describe_parameter(p, values=p in self.new_params) for p, name in self.names.items()}
        names = agree_on_newcomers([self.names[p] for p in arrived], [self.names[p] for p in others], known, self.group)
        resumed = [bucket for bucket in self.buckets if bucket.suspended and set(bucket.names) & set(names)]
        for bucket in resumed:
            bucket.suspended, bucket.idle_steps = False, 0
        self.new_params.clear()
        return [*resumed, *self.build_buckets(names)]

    def suspend_frozen(self) -> bool:
        """Stop sending what is frozen on all ranks, from time to time; return whether there was any."""
        if not any(bucket.idle_steps in IDLE_CHECK_STEPS for bucket in self.active_buckets):
            return False
        idle = [number for number, bucket in enumerate(self.buckets) if bucket.idle_steps]
        frozen = [number for number in idle if not any(map(expects_gradient, self.buckets[number].params))]
        agreed = set.intersection(*map(set, collectives.gather_json(frozen, "gradients.frozen", self.group)))
        for number in agreed:
            self.buckets[number].suspended = True
        return bool(agreed)


def expects_gradient(p: torch.nn.Parameter) -> bool:
    """Return whether a parameter has a gradient or may get one."""
    return p.requires_grad or p.grad is not None


def describe_parameter(p: torch.nn.Parameter, *, values: bool) -> str:
    """Describe what must be the same of a parameter on all ranks: its type, shape and, with values, every bit."""
    text = f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}"
    return f"{text} with checksum {int(checksum_tensor(p)) & (2**64 - 1):016x}" if values else text


def agree_on_newcomers(
    arrived: Sequence[str], others: Sequence[str], known: Mapping[str, str], group: collectives.Group
) -> list[str]:
    """Return the names of the parameters that some rank brings, in an order that is the same on all ranks.

    The order is that in which gradients came on the rank that has most of them.

    Args:
        arrived: this rank's newcomers whose gradient has come, in that order.
        others: this rank's other newcomers.
        known: all parameters that this rank has, by name, as `describe_parameter` describes them.
        group: the ranks, all of which call this.

    Raises:
        RunError: on all ranks, if one of them is missing on a rank, or differs there.
    """
    answers = collectives.gather_json([list(arrived), list(others)], "gradients.order", group)
    longest = max((first for first, _ in answers), key=len)
    everything = chain(longest, *(first for first, _ in answers), *(rest for _, rest in answers))
    names = list(dict.fromkeys(everything))
    descriptions = collectives.gather_json([known.get(name) for name in names], "gradients.newcomers", group)
    for rank, theirs in enumerate(descriptions):
        for name, first, other in zip(names, descriptions[0], theirs, strict=True):
            if first != other:
                raise RunError(
                    f"parameter {name} is {first or 'not in the optimizer'} on rank 0 and "
                    f"{other or 'not in the optimizer'} on rank {rank}: add it on all ranks alike, with equal values"
                )
    return names
