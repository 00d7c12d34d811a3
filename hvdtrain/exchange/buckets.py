"""Cutting a model's parameters into flat buckets.

Knows parameters and their gradients, and no optimizer.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import FusedCodec, RandomKey
from hvdtrain.compression.compressed_scatter import CompressedScatterReducer
from hvdtrain.compression.hierarchical_reducer import HierarchicalReducer, RoundOrder
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer, ReducerOptions
from hvdtrain.compression.scatter_reducer import PartOwner, ScatterReducer
from hvdtrain.compression.spec import AUTO, NONE, Spec, make_codec
from hvdtrain.exchange.local_tensors import is_split_dtensor, local_tensor, wrap_local
from hvdtrain.exchange.parameter_checks import WIRE_DTYPES
from hvdtrain.exchange.partition import NamedParameters, Partition

# The first bucket is small so that the network starts early in the backward pass.
FIRST_BUCKET_BYTES = 1 << 20
# On CPUs the second bucket should be full when the first has been sent: at 1 Gbit/s, with 25 MiB, the network waited
# for it up to 50 ms of a step. And the two rounds of codecs overlap better in pieces.
CPU_BUCKET_BYTES = 8 << 20
# Four rounds, one after the other, overlap with those of other buckets: at 100 Mbit/s 1.7 times as fast as flat, with
# 8 MiB 1.5 times.
HOST_BUCKET_BYTES = 2 << 20
# NCCL cuts each tensor into as many parts as there are ranks: larger ones are faster. Codecs give it less.
GPU_BUCKET_BYTES = 25 << 20
# What a sparse gradient adds to its flag instead of 1; 900 ranks together add less than one dense gradient. A mean
# times the number of ranks is not quite the sum: 41 ranks of which one has a dense gradient make 0.99999994.
SPARSE_FLAG = 1 / 1024
HEAD_SIZE = 2  # numbers that travel once a step, or with each bucket that is not compressed: `Bucket`


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How gradients are summed over ranks; the same on all of them."""

    average: bool  # whether the sum is divided by the number of ranks
    spec: Spec  # compression
    seed: int = 0  # of compression's randomness
    name: str = ""  # before those of its collectives, if another exchange may be under way at the same time
    group: collectives.Group = None  # the ranks; None: all
    bucket_bytes: int | None = None  # about as much is sent at once; None: as suits the device and, on a GPU, the codec
    round_order: RoundOrder | None = None  # each host encodes the sum of its ranks
    partition: Partition | None = None  # each rank has the sums of its part only, of which it updates the parameters


@dataclass(eq=False)
class Bucket:
    """Some parameters' gradients in one flat tensor, and a flag for each: was it used in this step?

    An uncompressed bucket travels as [gradients | flags | head]. The head is two numbers: `late` counts the ranks that
    have a gradient of a parameter that is in no bucket that is sent, `odd` those whose steps so far are an odd number,
    to find ranks that are not in the same step. The flags of a compressible bucket travel separately, and one head with
    all of them (`BucketLayout.flags`); so do those of a bucket of which each rank has its part of the sums only.
    """

    params: list[torch.nn.Parameter]
    names: list[str]
    views: list[torch.Tensor]  # of the reducer's flat, each in its parameter's shape and memory format
    flags: torch.Tensor  # (len(params),), summed over ranks
    head: torch.Tensor  # (HEAD_SIZE,), or (0,) if compressible
    reducer: CompressedReducer | PlainReducer
    compressible: bool  # a codec may carry it, or it is scattered: its flags travel separately
    collective_name: str  # of its collectives, which a codec adds its own to
    round_order: RoundOrder | None  # of the exchange, if each host encodes the sum of its ranks
    method: str = NONE  # "powersgd:4"
    filled: set[int] = field(default_factory=set)  # indices of params whose gradient is in
    sent: bool = False
    suspended: bool = False  # not sent: on no rank does a parameter of it require a gradient
    used: Sequence[float] = ()  # the flags of the last step, summed over ranks
    idle_steps: int = 0  # steps in a row in which no rank used it
    memory_views: dict[torch.Tensor, list[torch.Tensor]] = field(default_factory=dict)
    ready_time: float = 0.0  # when it was full in the last step, by time.perf_counter

    def put_gradient(self, index: int, gradient: torch.Tensor | None, step: int) -> None:
        """Take in the gradient of the parameter with that index; None: it has none on this rank, which is zero."""
        reducer, view = self.reducer, self.views[index]
        if not (isinstance(reducer, CompressedReducer) and reducer.fuses_residual(step)):
            if gradient is None:
                view.zero_()
            elif gradient is not view:
                view.copy_(gradient)
            return
        # In one pass through memory: the gradient and what has not been sent of those before it.
        assert reducer.residual is not None and reducer.next_residual is not None
        residual, total = (self._views_of(memory)[index] for memory in (reducer.residual, reducer.next_residual))
        if gradient is None:
            gradient = view.zero_()
        if isinstance(reducer.codec, FusedCodec):
            if gradient.stride() != view.stride():
                gradient = view.copy_(gradient)
            n, m = matrix_shape(self.params[index])
            matrices = (x.as_strided((n, m), (m, 1)) for x in (total, residual, gradient))
            reducer.codec.encode_fused(index, *matrices)
        else:
            torch.add(residual, gradient, out=total)

    def leave_out(self, pruned: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Let gradients of pruned weights not travel: they are zero in the sum.

        pruned: by parameter, bool and shaped like it, the same on all ranks: True for what is pruned, now and later.
        """
        if not isinstance(self.reducer, PlainReducer):
            return  # refused with --prune
        is_kept = None
        if any(p in pruned and pruned[p].any() for p in self.params):
            is_kept = torch.ones(len(self.reducer.flat), dtype=torch.bool, device=self.reducer.flat.device)
            for p, view in zip(self.params, make_views(is_kept, self.params), strict=True):
                if p in pruned:
                    torch.logical_not(pruned[p], out=view)
        self.reducer.send_only(None if is_kept is None else is_kept.nonzero().squeeze(1))

    def start_reduction(self, step: int) -> None:
        """Start the sum of the gradients that were put."""
        if isinstance(self.reducer, CompressedReducer):
            self.reducer.start_reduction(step, fused=self.reducer.fuses_residual(step))
        else:
            self.reducer.start_reduction(step)

    def commit_step(self, used: Sequence[float]) -> None:
        """Take over the reducer's state of a step; used: as for `set_gradients`."""
        ends = itertools.accumulate(map(real_numel, self.params))
        parts = zip(ends, self.params, used, strict=True)
        self.reducer.commit_step([(end - real_numel(p), end) for end, p, ranks in parts if ranks == 0])

    def set_gradients(self, used: Sequence[float]) -> None:
        """Set every `p.grad` to its view of the reduced bucket.

        Args:
            used: each parameter's flag, summed over ranks: 0 if no rank used it, below 0.9 if all that did have sparse
                gradients.
        """
        self.used = used
        for p, view, ranks in zip(self.params, self.views, used, strict=True):
            if ranks == 0 or isinstance(self.reducer, PartOwner):  # whose parts have the sums
                p.grad = None
            elif ranks < 0.9:  # optimizers for sparse gradients accept no others
                p.grad = view.to(p.dtype).to_sparse(1)
            elif p.grad is not view:
                p.grad = wrap_local(view.to(p.dtype), p)  # the view itself if the types are the same

    def split_flat(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the parameters' parts of a tensor that is laid out as the reducer's flat."""
        widths = [real_numel(p) for p in self.params]
        return torch.split(flat[: sum(widths)], widths)

    def _views_of(self, memory: torch.Tensor) -> list[torch.Tensor]:
        if memory not in self.memory_views:
            if len(self.memory_views) == 2:  # a reducer has two, unless they were loaded
                self.memory_views.clear()
            self.memory_views[memory] = make_views(memory, self.params)
        return self.memory_views[memory]


def real_numel(p: torch.Tensor) -> int:
    """Return how many real numbers this rank has of a parameter: two for each complex one."""
    return local_tensor(p).numel() * (2 if p.is_complex() else 1)


def matrix_shape(p: torch.Tensor) -> tuple[int, int]:
    """Return the shape of what this rank has of a parameter as a matrix (n, m): (1, n) for one axis or none.

    Its axes are divided into the first few and the others so that min(n, m) is largest; by the first division if
    several are equal. A convolution's kernel of torch, (O, I, H, W), becomes (O, IHW), one of JAX or Keras,
    (H, W, I, O), becomes (HWI, O).
    """
    p = local_tensor(p)
    if p.dim() < 2:
        return 1, p.numel()
    rows = itertools.accumulate(p.shape[:-1], operator.mul)
    return max(((n, p.numel() // max(n, 1)) for n in rows), key=min)


def make_buckets(named: NamedParameters, config: ExchangeConfig, first: int = 0) -> list[Bucket]:
    """Make buckets of one dtype, device and codec each.

    Args:
        named: the parameters, in the order in which backward finishes them.
        config: how they are summed.
        first: the number of the first bucket; those before it exist already.
    """
    buckets: list[Bucket] = []
    for members, dtype, argument in iterate_bucket_members(named, config):
        number = first + len(buckets)
        separate_flags = argument is not None or config.partition is not None
        buckets.append(make_bucket(members, dtype, number, config, compressible=separate_flags))
        if argument is not None and config.spec.method != AUTO:
            key = RandomKey(config.seed, 0, number, collectives.rank(config.group))
            set_compression(buckets[-1], config.spec, argument, key)
    return buckets


def iterate_bucket_members(
    named: NamedParameters, config: ExchangeConfig
) -> Iterator[tuple[NamedParameters, torch.dtype, str | None]]:
    """Yield the parameters of each bucket, the type in which they travel, and the argument of their codec or None."""
    groups: dict[tuple[torch.dtype, torch.device, str | None, object], NamedParameters] = {}
    for name, p in named:
        argument = None if p.is_complex() else config.spec.argument_for(name, local_tensor(p).numel(), p.dim())
        # Codecs take float32.
        dtype = WIRE_DTYPES.get(p.dtype.to_real(), torch.float32) if argument is None else torch.float32
        # Parameters that are gathered lie in one tensor; what all ranks of a replica have alike is encoded alike.
        kind = (p.is_complex() if config.partition is None else p.dtype, is_split_dtensor(p))
        groups.setdefault((dtype, p.device, argument, kind), []).append((name, p))
    for (dtype, device, argument, _), members in groups.items():
        plain_on_gpu = device.type == "cuda" and argument is None
        on_hosts = config.round_order is not None and argument is not None and device.type == "cpu"
        default = HOST_BUCKET_BYTES if on_hosts else GPU_BUCKET_BYTES if plain_on_gpu else CPU_BUCKET_BYTES
        most = config.bucket_bytes or default
        limit = min(FIRST_BUCKET_BYTES, most)
        while members:
            count, taken = 0, 0
            while count < len(members) and taken < limit:
                taken += real_numel(members[count][1]) * dtype.itemsize
                count += 1
            yield members[:count], dtype, argument
            members = members[count:]
            limit = most


def make_bucket(
    members: NamedParameters, dtype: torch.dtype, number: int, config: ExchangeConfig, compressible: bool
) -> Bucket:
    """Make a bucket that is all-reduced as it is.

    Its flags follow the gradients and travel with them; if a codec may carry it, they travel separately, uncompressed,
    and are summed.
    """
    partition, bounds = config.partition, list[int]()
    if partition is not None:
        members, bounds = partition.cut_bucket(members, [real_numel(p) for _, p in members])
    params = [p for _, p in members]
    count = sum(map(real_numel, params))
    extra = 0 if compressible else len(params) + HEAD_SIZE
    flat = torch.zeros(count + extra, dtype=dtype, device=params[0].device)
    flags = torch.zeros(len(params), device=flat.device) if compressible else flat[count:-HEAD_SIZE]
    head = flat[:0] if compressible else flat[-HEAD_SIZE:]
    reducer = PlainReducer(f"{config.name}gradients.{number}", flat, config.average, config.group)
    if partition is not None:
        reducer = ScatterReducer(reducer, bounds, params[0], partition.mirrors)
    names, views = [name for name, _ in members], make_views(flat, params)
    return Bucket(params, names, views, flags, head, reducer, compressible, reducer.name, config.round_order)


def set_compression(bucket: Bucket, spec: Spec, argument: str, key: RandomKey) -> None:
    """Give the bucket another reducer; what the one before had not sent yet is carried over to it.

    Args:
        bucket: a compressible one.
        spec: of one method, or none.
        argument: the method's.
        key: of the codec's randomness.
    """
    unsent = bucket.reducer.total_unsent()
    bucket.reducer = make_reducer(bucket, bucket.reducer.flat, spec, argument, key)
    bucket.reducer.carried_over = unsent
    bucket.memory_views.clear()
    bucket.method = f"{spec.method}:{argument}" if argument else spec.method


def make_reducer(
    bucket: Bucket, flat: torch.Tensor, spec: Spec, argument: str, key: RandomKey
) -> CompressedReducer | PlainReducer:
    """Make a reducer of a flat tensor that is laid out as the bucket's; arguments as for `set_compression`."""
    average, group, name = bucket.reducer.average, bucket.reducer.group, bucket.collective_name
    if spec.method == NONE:
        return PlainReducer(name, flat, average, group)
    scatters = isinstance(bucket.reducer, PartOwner) or bucket.round_order is not None
    codec = make_codec(spec, argument, [matrix_shape(p) for p in bucket.params], key, flat.device, scatters)
    options = ReducerOptions(
        average=average, group=group, feedback=spec.feedback, warmup=spec.warmup, momentum=spec.momentum
    )
    name = f"{name}.{spec.method}{argument}"
    if isinstance(bucket.reducer, PartOwner):
        return CompressedScatterReducer(name, flat, codec, key, options, bucket.reducer)
    if bucket.round_order is not None:
        return HierarchicalReducer(name, flat, codec, key, options, bucket.round_order)
    return CompressedReducer(name, flat, codec, key, options)


def make_views(flat: torch.Tensor, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return views of flat for the parameters, one after the other, in their own shapes and memory formats."""
    views, offset = [], 0
    for p in map(local_tensor, params):
        piece = flat[offset : offset + real_numel(p)]
        offset += real_numel(p)
        if p.is_complex():
            piece = torch.view_as_complex(piece.view(-1, 2))  # at an even offset: they have buckets of their own
        views.append(view_like(piece, p))
    return views


def view_like(flat: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return (values,) in the order of a parameter's memory in its shape, without a copy."""
    return flat.as_strided(p.shape, p.stride()) if is_dense(p) else flat.view(p.shape)


def is_dense(p: torch.Tensor) -> bool:
    """Return whether a tensor's memory has no gaps and no overlaps."""
    return torch.empty_like(p).stride() == p.stride()
