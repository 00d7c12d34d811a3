"""What a rank holds of gradients and optimizer state in a layout of many ranks, without these ranks.

The buckets are those that the training would make, and their parts are cut as it would cut them; so one process can
count the bytes of any number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from hvdtrain.bench.activations import count_memory
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer
from hvdtrain.compression.scatter_reducer import PartOwner
from hvdtrain.compression.spec import Spec
from hvdtrain.exchange.buckets import Bucket, ExchangeConfig
from hvdtrain.exchange.layout import BucketLayout
from hvdtrain.exchange.local_tensors import local_tensor
from hvdtrain.exchange.partition import NamedParameters, Partition, ShardUnit, assign_mirrors
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.pieces import Piece, ShardedBucket
from hvdtrain.torch.table_group import Table
from hvdtrain.torch.table_plan import TableSize, count_piece_rows, deal_tables


@dataclass(frozen=True)
class TrainedParameters:
    """What one optimizer has after a step.

    Attributes:
        named: its parameters, in the order of its groups.
        states: what it keeps of each, and the average of --ema.
        trained: those that had a gradient in the step.
        unit: how it may be divided; None: it may not.
    """

    named: NamedParameters
    states: Mapping[nn.Parameter, StateDict]
    trained: frozenset[nn.Parameter]
    unit: ShardUnit | None

    def select(self, params: Collection[nn.Parameter]) -> TrainedParameters:
        """Return what it has of some parameters."""
        named = [(name, p) for name, p in self.named if p in params]
        states = {p: state for p, state in self.states.items() if p in params}
        return replace(self, named=named, states=states, trained=self.trained & set(params))


@dataclass(frozen=True)
class RankBytes:
    """Bytes of the rank that has most of them."""

    gradients: int
    state: int

    @property
    def total(self) -> int:
        """Both."""
        return self.gradients + self.state

    def __add__(self, other: RankBytes) -> RankBytes:
        return RankBytes(self.gradients + other.gradients, self.state + other.state)


def count_replicated(held: TrainedParameters, spec: Spec, bucket_bytes: int | None, ranks: int) -> RankBytes:
    """Return what each rank has in plain data parallelism.

    Args:
        held: by an optimizer.
        spec: compression, whose residuals count as gradients.
        bucket_bytes: about as much is sent at once; None: as suits the device.
        ranks: in all.
    """
    state = sum(count_tensors(state) for state in held.states.values())
    if ranks == 1:  # nothing is exchanged
        return RankBytes(sum(count_bytes(p) for _, p in held.named if p in held.trained), state)
    layout = BucketLayout(ExchangeConfig(average=False, spec=spec, bucket_bytes=bucket_bytes))
    layout.names = {p: name for name, p in held.named}
    buckets = layout.build_buckets([name for name, p in reversed(held.named) if p in held.trained])
    return RankBytes(sum(count_bucket(bucket, ranks) + count_copies(bucket) for bucket in buckets), state)


def count_sharded(
    held: TrainedParameters, spec: Spec, bucket_bytes: int | None, ranks: int, mirrored: bool
) -> RankBytes:
    """Return what the rank has that has most, with --shard optimizer; arguments as for `count_replicated`."""
    assert held.unit is not None
    mirrors = assign_mirrors(["this host"] * ranks) if mirrored else []
    partition = Partition(ranks, held.unit, mirrors)
    layout = BucketLayout(ExchangeConfig(average=False, spec=spec, bucket_bytes=bucket_bytes))
    layout.names = {p: name for name, p in held.named}
    layout.scatter_sums(partition, {name for name, p in held.named if p.requires_grad})
    gradients, states = [0] * ranks, [0] * ranks
    divided: set[nn.Parameter] = set()
    for bucket in layout.buckets:
        assert isinstance(bucket.reducer, PartOwner)
        divided.update(bucket.params)
        sharded = ShardedBucket(bucket.params, bucket.reducer.bounds, partition, 0)
        is_used = bool(held.trained & set(bucket.params))
        for rank in range(ranks):
            pieces = [piece for part in sharded.list_held(rank) for piece in part]
            states[rank] += sum(count_piece(piece, held.states.get(piece.param, {})) for piece in pieces)
            if is_used:
                own = sum(piece.num_reals for piece in pieces) * bucket.reducer.flat.element_size()
                gradients[rank] += count_bucket(bucket, ranks) + own
                states[rank] += own if isinstance(bucket.reducer, CompressedReducer) else 0  # unsent of the changes
    whole = sum(count_tensors(state) for p, state in held.states.items() if p not in divided)
    return RankBytes(max(gradients), max(states) + whole)


def count_divided(held: TrainedParameters, ranks: int) -> RankBytes:
    """Return what the first rank has, with --shard model, of an optimizer's gradients and state; no rank has more."""
    gradients = sum(count_first_rows(p, ranks) for _, p in held.named if p in held.trained)
    tensors = ((p, value) for p, state in held.states.items() for value in state.values() if isinstance(value, Tensor))
    state = sum(count_first_rows(value, ranks) if value.shape == p.shape else value.nbytes for p, value in tensors)
    return RankBytes(gradients, state)


def count_dealt(held: TrainedParameters, tables: Sequence[Table], ranks: int) -> list[tuple[int, RankBytes]]:
    """Return what each rank has of dealt tables: the bytes of its rows, and the optimizer's.

    Gradients are counted as if all rows were looked up, unless they are sparse: then only as those of this step.
    """
    pieces = deal_tables([TableSize(table.num_embeddings, table.embedding_dim) for table in tables], ranks)
    found = []
    for rank in range(ranks):
        weights = gradients = states = 0
        for number, table in enumerate(tables):
            p, num_rows = cast(nn.Parameter, table.weight), table.num_embeddings
            rows = count_piece_rows([piece for piece in pieces if (piece.table, piece.rank) == (number, rank)])
            own = rows * (p.nbytes // num_rows)
            weights += own
            if rows and p in held.trained:
                gradients += min(own, count_memory([p.grad])) if table.sparse and p.grad is not None else own
            for value in held.states.get(p, {}).values() if rows else ():
                if isinstance(value, Tensor):
                    is_cut = value.dim() > 0 and len(value) == num_rows
                    states += rows * (value.nbytes // num_rows) if is_cut else value.nbytes
        found.append((weights, RankBytes(gradients, states)))
    return found


def count_first_rows(x: Tensor, ranks: int) -> int:
    """Return the bytes of the first rank's rows, as FSDP2 divides a tensor."""
    return -(-len(x) // ranks) * (x.nbytes // max(1, len(x))) if x.dim() else x.nbytes


def count_bucket(bucket: Bucket, ranks: int) -> int:
    """Return the bytes of a bucket's gradients, of its flags, and of what compression keeps of it."""
    reducer: PlainReducer | CompressedReducer = bucket.reducer
    total = reducer.flat.nbytes + (bucket.flags.nbytes if bucket.compressible else 0)
    if isinstance(reducer, CompressedReducer):
        for kept in (reducer.residual, reducer.next_residual, reducer.velocity):
            total += 0 if kept is None else kept.nbytes
        if reducer.shard_residual is not None:
            block = reducer.codec.block_size
            total += -(-len(reducer.flat) // (ranks * block)) * block * reducer.shard_residual.element_size()
    return total


def count_copies(bucket: Bucket) -> int:
    """Return the bytes of gradients that are not views of their bucket, since they have another type."""
    return sum(count_bytes(p) for p, view in zip(bucket.params, bucket.views, strict=True) if p.dtype != view.dtype)


def count_tensors(state: StateDict) -> int:
    """Return the bytes of the tensors that an optimizer keeps of a parameter."""
    return sum(count_bytes(value) for value in state.values() if isinstance(value, Tensor))


def count_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor, of a DTensor those of this rank's part."""
    return local_tensor(x).nbytes


def count_piece(piece: Piece, state: StateDict) -> int:
    """Return the bytes of what a piece has of a parameter's state: its part of what has the parameter's shape."""
    total = 0
    for value in state.values():
        if isinstance(value, Tensor):
            is_cut = value.shape == piece.param.shape and not piece.whole
            total += (piece.end - piece.start) * value.element_size() if is_cut else value.nbytes
    return total
