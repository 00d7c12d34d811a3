"""An optimizer whose state is sharded: each rank updates its part of every bucket, and all gather what was updated.

    gradients      [ bucket 0 ........ | bucket 1 .... ]       a part of each is summed on each rank (`ScatterReducer`)
    pieces, rank 0 [ w w w w ]         [ v v v ]               parameters of the optimizer, while it steps
            rank 1           [ w w b b ]       [ v v c ]
    parameters     [ w w w w | w w b b | v v v | v v c ]       are gathered, a bucket at a time

A piece is what a rank has of one parameter, a view of its memory. During a step the optimizer's groups hold pieces in
place of parameters, so that it makes a state for them alone, and its hyperparameters stay where they are. A parameter
that no rank has used leaves its pieces without a gradient, as it would be without shards.

With --deterministic gradients are summed as without shards, whole on every rank, so that nothing depends on the number
of ranks; then the optimizer alone sees pieces.

With --mirror 1 a rank has the pieces of another one as well, and updates them alike. It can undo an update until it has
what all ranks have updated. What becomes of pieces in another world is in `hvdtrain.torch.part_exchange`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.compression.scatter_reducer import PartOwner, ScatterReducer, prefers_reduce_scatter
from hvdtrain.compression.spec import NONE, parse_compression
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.buckets import ExchangeConfig, iterate_bucket_members, real_numel
from hvdtrain.exchange.partition import NamedParameters, Partition
from hvdtrain.torch.encoded_changes import EncodedChanges, find_codec
from hvdtrain.torch.optimizer_methods import read_param_groups
from hvdtrain.torch.piece_owner import PieceOwner
from hvdtrain.torch.pieces import ShardedBucket, cut_state
from hvdtrain.torch.tensors import all_finite, view_as_real
from hvdtrain.torch.update_undo import UpdateUndo


class OptimizerShards(PieceOwner):
    """This rank's part of an optimizer.

    Attributes:
        buckets: in the order in which they are sent.
        uses_reduce_scatter: whether gradients come by Horovod's reduce-scatter, as it is faster than the all-to-all.
        undo: what takes back the update that was begun, if that is possible; else None.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        partition: Partition,
        exchange: BucketedExchange | None,
        name: str,
        trained: Collection[str],
    ) -> None:
        """Divide an optimizer on all ranks, whose parameters and state are the same, before the first step.

        Args:
            optimizer: a wrapped one, whose state is divided.
            partition: how its parameters are cut.
            exchange: of its gradients, of which each rank is to have its part only; None: it brings them whole.
            name: of its collectives.
            trained: names of the parameters that are, the same on all ranks.
        """
        super().__init__(optimizer)
        self.exchange, self.name = exchange, name
        self.partition = partition
        self.rank = collectives.rank()
        self.names: dict[nn.Parameter, str] = {}
        self.uses_reduce_scatter = False
        self._changes: dict[ShardedBucket, EncodedChanges] = {}  # of the step, of buckets that a codec carries
        self.buckets: list[ShardedBucket] = []
        self.undo: UpdateUndo | None = None
        self._gathering: list[tuple[ShardedBucket, collectives.Handle]] = []
        self._hooks: list[Callable[..., object]] = []  # of the step, to be called once all is gathered
        if exchange is not None:
            exchange.scatter_sums(partition, trained)
            if partition.unit == "elements":
                flats = [bucket.reducer.flat for bucket in exchange.buckets]
                self.uses_reduce_scatter = prefers_reduce_scatter(max(flats, key=len), f"{name}trial", exchange.group)
        self.adopt_parameters(list_named(optimizer))

    def adopt_parameters(self, named: NamedParameters) -> None:
        """Divide the parameters that are not yet, on all ranks alike."""
        made: list[ShardedBucket] = []
        self.names |= {p: name for name, p in named}
        if self.exchange is not None:
            for bucket in self.exchange.buckets[len(self.buckets) :]:
                assert isinstance(bucket.reducer, PartOwner)
                if isinstance(bucket.reducer, ScatterReducer):
                    bucket.reducer.uses_reduce_scatter = self.uses_reduce_scatter
                made.append(ShardedBucket(bucket.params, bucket.reducer.bounds, self.partition, self.rank))
                made[-1].source = bucket
        else:
            made = self._make_buckets([(name, p) for name, p in named if p not in self.pieces])
        for sharded in made:
            self.pieces |= {p: [] for p in sharded.params}
            for piece, own in sharded.held:
                self.pieces[piece.param].append(own)
            self._divide_state(sharded)
        self.buckets += made

    def _make_buckets(self, named: NamedParameters) -> list[ShardedBucket]:
        """Return buckets of parameters whose gradients come whole."""
        config = ExchangeConfig(average=False, spec=parse_compression(NONE), partition=self.partition)
        floating = [(name, p) for name, p in reversed(named) if p.is_floating_point() or p.is_complex()]
        self.partition.assign_owners(p for _, p in floating)
        made = []
        for members, _, _ in iterate_bucket_members(floating, config):
            sorted_members, bounds = self.partition.cut_bucket(members, [real_numel(p) for _, p in members])
            made.append(ShardedBucket([p for _, p in sorted_members], bounds, self.partition, self.rank))
        return made

    def _divide_state(self, bucket: ShardedBucket) -> None:
        """Let this rank's pieces have their part of a state that the optimizer has before its first step."""
        state = self.optimizer.state
        whole = {p: state.pop(p) for p in bucket.params if p in state}
        for piece, own in bucket.held:
            if piece.param in whole:
                state[own] = {key: cut_state(piece, value) for key, value in whole[piece.param].items()}

    @property
    def held_values(self) -> set[nn.Parameter]:
        """This rank's pieces, and those that it mirrors."""
        return {values for bucket in self.buckets for _, values in bucket.held}

    @property
    def can_undo(self) -> bool:
        """Whether an update can be taken back until all ranks have made it."""
        return bool(self.partition.mirrors)

    @property
    def encoded(self) -> set[nn.Parameter]:
        """The parameters whose changes a codec carries."""
        return {p for bucket in self.buckets if find_codec(bucket) is not None for p in bucket.params}

    def describe(self, state_bytes: float) -> str:
        """Return the line of the plan. state_bytes: of each value; 0: not known before the first step."""
        values = [sum(map(real_numel, bucket.params)) for bucket in self.buckets]
        most = [max(end - begin for begin, end in itertools.pairwise(bucket.bounds)) for bucket in self.buckets]
        if self.partition.unit == "elements":
            copies = 2 if self.partition.mirrors else 1
            whole, own = sum(values) * state_bytes / 2**20, copies * sum(most) * state_bytes / 2**20
            way = "reduce-scatter" if self.uses_reduce_scatter else "all-to-all"
            how = "whole gradients" if self.exchange is None else f"gradients by {way}"
            if self.exchange is not None and self.encoded:
                how = f"gradients and updates by {self.exchange.config.spec.text}"
            how += ", mirrored" * bool(self.partition.mirrors)
            return f"shard     optimizer: {own:.1f} of {whole:.1f} MiB of state on each rank, element-wise; {how}"
        loads = self.partition.loads
        return (
            f"shard     optimizer: the state of {max(loads):,} of {sum(loads):,} values on each rank at most, by whole "
            f"parameters{', mirrored' * bool(self.partition.mirrors)}"
        )

    def forget_state(self) -> None:
        """Leave the optimizer without the pieces' state, which would be of no use to it alone."""
        for values in self.held_values:
            self.optimizer.state.pop(values, None)

    # A step.

    def take_gradients(self) -> None:
        """Give the pieces their gradients, which are reduced, and divide parameters that have been added."""
        self.adopt_parameters(list_named(self.optimizer))
        for bucket in self.buckets:
            bucket.is_used = bucket.take_gradients()
        self.has_gradients = any(bucket.is_used for bucket in self.buckets)

    def drop_gradients(self) -> None:
        """Free the memory of the gradients' sums, and of the step."""
        self._changes.clear()
        for bucket in self.buckets:
            for _, own in bucket.held:
                own.grad = None
            if bucket.source is not None and isinstance(bucket.source.reducer, PartOwner):
                bucket.source.reducer.drop_part()

    def total_norm(self) -> Tensor:
        """Return the norm of all ranks' gradients together, (): not finite if any of them is; all ranks call this."""
        gradients = [own.grad for bucket in self.buckets for _, own in bucket.own if own.grad is not None]
        real = [view_as_real(gradient) for gradient in gradients]
        total = sum_squares(real, torch.float32)
        if not math.isfinite(total):  # squares of large float32 values are not
            total = sum_squares(real, torch.float64)
        found = collectives.sum_float64(np.array([total]), f"{self.name}norm")
        exact = any(bucket.dtype == torch.float64 for bucket in self.buckets)
        dtype = torch.float64 if exact else torch.float32
        return torch.tensor(found[0], dtype=torch.float64).sqrt().to(dtype)

    def find_nonfinite(self) -> set[nn.Parameter]:
        """Return the parameters whose gradients are not finite on some rank; all ranks call this."""
        own = [
            self.names[piece.param]
            for bucket in self.buckets
            for piece, values in bucket.own
            if values.grad is not None and not all_finite([values.grad])
        ]
        found = {name for names in collectives.gather_json(own, f"{self.name}nonfinite") for name in names}
        return {p for p, name in self.names.items() if name in found}

    def prepare_update(self) -> None:
        """Remember what codecs encode the change of; before the optimizer steps."""
        for bucket in self.buckets:
            if bucket.is_used and (reducer := find_codec(bucket)) is not None and not reducer.is_dense:
                self._changes[bucket] = EncodedChanges(bucket, reducer, self.optimizer.state)

    def start_gathering(self, hooks: Iterable[Callable[..., object]]) -> None:
        """Start bringing every rank what the others have updated; all ranks call this.

        hooks: of the optimizer's step, to be called afterwards.
        """
        self._hooks = list(hooks)
        for number, bucket in enumerate(self.buckets):
            if bucket.is_used and self.partition.size > 1:
                if self.exchange is None:  # else its reducers count them
                    self.optimizer.wire_bytes += bucket.count_own_bytes() * (self.partition.size - 1)
                name = f"{self.name}parameters.{number}"
                changes = self._changes.get(bucket)
                own = [own for _, own in bucket.own]
                handle = changes.start_gathering(name) if changes else bucket.start_gathering(name, own)
                self._gathering.append((bucket, handle))

    def iterate_gathered(self) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """Wait for what the others have updated; yield the parameters of each bucket with their new values."""
        gathering, self._gathering = self._gathering, []
        for bucket, handle in gathering:
            changes = self._changes.get(bucket)
            yield changes.await_values(handle) if changes else bucket.cut_gathered(handle)

    def conclude_update(self) -> None:
        """Take note that the parameters are updated."""
        self.undo = None
        self.drop_gradients()
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook(self.optimizer, (), {})


def sum_squares(values: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Return the sum of the squares of all values, of each tensor in a type no smaller than `dtype`."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, dtype)).double() for x in values]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def list_named(optimizer: torch.optim.Optimizer) -> NamedParameters:
    """Return a wrapped optimizer's parameters, in the order of its groups, and their names."""
    names: dict[nn.Parameter, str] = vars(optimizer)["_parameter_names"]
    return [(names[p], p) for group in read_param_groups(optimizer) for p in group["params"]]
