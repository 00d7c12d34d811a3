"""Cutting a model's parameters into flat buckets.

Knows parameters and their gradients, and no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import FusedCodec, RandomKey
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer, ReducerOptions
from hvdtrain.compression.spec import AUTO, NONE, Spec, layer_contains, make_codec
from hvdtrain.system.errors import UserError

# The first bucket is small so that the network starts early in the backward pass.
FIRST_BUCKET_BYTES = 1 << 20
# On CPUs the second bucket should be full when the first has been sent: at 1 Gbit/s, with 25 MiB, the network waited
# for it up to 50 ms of a step. And the two rounds of codecs overlap better in pieces.
CPU_BUCKET_BYTES = 8 << 20
# NCCL cuts each tensor into as many parts as there are ranks: larger ones are faster. Codecs give it less.
GPU_BUCKET_BYTES = 25 << 20
# Horovod reduces no other floating type; bfloat16 travels as float32.
WIRE_DTYPES = {torch.float16: torch.float16, torch.float32: torch.float32, torch.float64: torch.float64}
# What a sparse gradient adds to its flag instead of 1; 900 ranks together add less than one dense gradient. A mean
# times the number of ranks is not quite the sum: 41 ranks of which one has a dense gradient make 0.99999994.
SPARSE_FLAG = 1 / 1024
SUPPORTED_DTYPES = (*WIRE_DTYPES, torch.bfloat16, torch.complex64, torch.complex128)


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How gradients are summed over ranks; the same on all of them."""

    average: bool  # whether the sum is divided by the number of ranks
    spec: Spec  # compression
    seed: int = 0  # of compression's randomness
    name: str = ""  # before those of its collectives, if another exchange may be under way at the same time
    group: collectives.Group = None  # the ranks; None: all
    bucket_bytes: int | None = None  # about as much is sent at once; None: as suits the device and, on a GPU, the codec


@dataclass(frozen=True)
class BucketReport:
    """A bucket as it is sent, for the run folder."""

    parameters: int
    values: int
    compression: str  # "none", "powersgd:4"
    bytes_sent: int  # by this rank in a step
    bytes_received: int


@dataclass(eq=False)
class Bucket:
    """Some parameters' gradients in one flat tensor, and a flag for each: was it used in this step?

    An uncompressed bucket travels as [gradients | flags | late]: `late` counts the ranks that have a gradient of a
    parameter that is in no bucket that is sent. The flags of a compressible bucket travel separately
    (`BucketLayout.flags`).
    """

    params: list[torch.nn.Parameter]
    names: list[str]
    views: list[torch.Tensor]  # of the reducer's flat, each in its parameter's shape and memory format
    flags: torch.Tensor  # (len(params),), summed over ranks
    late_flag: torch.Tensor  # (1,), or (0,) if compressible
    reducer: CompressedReducer | PlainReducer
    compressible: bool  # a codec may carry it; whether one does, the reducer knows
    collective_name: str  # of its collectives, which a codec adds its own to
    method: str = NONE  # "powersgd:4"
    filled: set[int] = field(default_factory=set)  # indices of params whose gradient is in
    sent: bool = False
    suspended: bool = False  # not sent: on no rank does a parameter of it require a gradient
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

    def set_gradients(self, used: Sequence[float]) -> None:
        """Set every `p.grad` to its view of the reduced bucket.

        Args:
            used: each parameter's flag, summed over ranks: 0 if no rank used it, below 0.9 if all that did have sparse
                gradients.
        """
        for p, view, ranks in zip(self.params, self.views, used, strict=True):
            if ranks == 0:
                p.grad = None
            elif ranks < 0.9:  # optimizers for sparse gradients accept no others
                p.grad = view.to(p.dtype).to_sparse(1)
            elif p.grad is not view:
                p.grad = view.to(p.dtype)  # the view itself if the types are the same

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


@dataclass(frozen=True)
class AwaitedSums:
    """A step's sums over ranks that have arrived."""

    buckets: list[Bucket]
    late: bool  # some are of parameters that were in no bucket that is sent
    stateful: bool  # some reducer keeps something for the next step


NamedParameters = list[tuple[str, torch.nn.Parameter]]


def check_parameters(named: NamedParameters, spec: Spec) -> None:
    """Raise UserError if a layer of the spec matches no parameter, or a parameter's type cannot be exchanged."""
    check_layers(spec, [name for name, _ in named])
    for name, p in named:
        check_dtype(name, p)


def check_layers(spec: Spec, names: Sequence[str]) -> None:
    """Raise UserError if a layer of the spec matches none of these names of parameters."""
    for layer in spec.layers:
        if not any(layer_contains(layer, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[0] or name for name in names}))
            raise UserError(f"compression {spec.text!r}: there is no parameter or module {layer!r}; there are: {known}")


def check_dtype(name: str, p: torch.nn.Parameter) -> None:
    """Raise UserError if the parameter requires a gradient and that has a type that cannot be exchanged."""
    if p.requires_grad and p.dtype not in SUPPORTED_DTYPES:
        raise UserError(
            f"parameter {name} is {p.dtype}, whose gradient cannot be exchanged; expected float16, bfloat16, float32, "
            "float64, complex64 or complex128: convert it, or freeze it with requires_grad_(False)"
        )


def real_numel(p: torch.Tensor) -> int:
    """Return how many real numbers a parameter holds: two for each complex one."""
    return p.numel() * (2 if p.is_complex() else 1)


def matrix_shape(p: torch.Tensor) -> tuple[int, int]:
    """Return a parameter's shape as a matrix: its first axis, and all others joined; (1, n) for one axis or none."""
    return (p.shape[0], p.numel() // p.shape[0]) if p.dim() > 1 else (1, p.numel())


def make_buckets(named: NamedParameters, config: ExchangeConfig, first: int = 0) -> list[Bucket]:
    """Make buckets of one dtype, device and codec each.

    Args:
        named: the parameters, in the order in which backward finishes them.
        config: how they are summed.
        first: the number of the first bucket; those before it exist already.
    """
    groups: dict[tuple[torch.dtype, torch.device, str | None, bool], NamedParameters] = {}
    for name, p in named:
        argument = None if p.is_complex() else config.spec.argument_for(name, p.numel(), p.dim())
        # Codecs take float32.
        dtype = WIRE_DTYPES.get(p.dtype.to_real(), torch.float32) if argument is None else torch.float32
        groups.setdefault((dtype, p.device, argument, p.is_complex()), []).append((name, p))
    buckets: list[Bucket] = []
    for (dtype, device, argument, _), members in groups.items():
        plain_on_gpu = device.type == "cuda" and argument is None
        most = config.bucket_bytes or (GPU_BUCKET_BYTES if plain_on_gpu else CPU_BUCKET_BYTES)
        limit = min(FIRST_BUCKET_BYTES, most)
        while members:
            count, taken = 0, 0
            while count < len(members) and taken < limit:
                taken += real_numel(members[count][1]) * dtype.itemsize
                count += 1
            number = first + len(buckets)
            buckets.append(make_bucket(members[:count], dtype, number, config, compressible=argument is not None))
            if argument is not None and config.spec.method != AUTO:
                key = RandomKey(config.seed, 0, number, collectives.rank(config.group))
                set_compression(buckets[-1], config.spec, argument, key)
            members = members[count:]
            limit = most
    return buckets


def make_bucket(
    members: NamedParameters, dtype: torch.dtype, number: int, config: ExchangeConfig, compressible: bool
) -> Bucket:
    """Make a bucket that is all-reduced as it is.

    Its flags follow the gradients and travel with them; if a codec may carry it, they travel separately, uncompressed,
    and are summed.
    """
    params = [p for _, p in members]
    count = sum(map(real_numel, params))
    flat = torch.zeros(count + (0 if compressible else len(params) + 1), dtype=dtype, device=params[0].device)
    flags = torch.zeros(len(params), device=flat.device) if compressible else flat[count:-1]
    late = flat[:0] if compressible else flat[-1:]
    reducer = PlainReducer(f"{config.name}gradients.{number}", flat, config.average, config.group)
    names, views = [name for name, _ in members], make_views(flat, params)
    return Bucket(params, names, views, flags, late, reducer, compressible, reducer.name)


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
    codec = make_codec(spec, argument, [matrix_shape(p) for p in bucket.params], key, flat.device)
    options = ReducerOptions(
        average=average, group=group, feedback=spec.feedback, warmup=spec.warmup, momentum=spec.momentum
    )
    return CompressedReducer(f"{name}.{spec.method}{argument}", flat, codec, key, options)


def make_views(flat: torch.Tensor, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return views of flat for the parameters, one after the other, in their own shapes and memory formats."""
    views, offset = [], 0
    for p in params:
        piece = flat[offset : offset + real_numel(p)]
        offset += real_numel(p)
        if p.is_complex():
            piece = torch.view_as_complex(
                piece.view(-1, 2)
            )  # pairs begin at even offsets: they have buckets of their own
        dense = torch.empty_like(p).stride() == p.stride()  # no gaps and no overlaps in its memory
        views.append(piece.as_strided(p.shape, p.stride(), piece.storage_offset()) if dense else piece.view(p.shape))
    return views
