"""Cutting a model's parameters into flat buckets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hvdtrain.collectives import ops
from hvdtrain.compression.channel import Channel, Plain
from hvdtrain.compression.codec import Key
from hvdtrain.compression.spec import Spec, make_codec
from hvdtrain.errors import UserError

# The first bucket is small so that the network starts early in the backward pass.
FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20
# Horovod reduces no other floating type; bfloat16 travels as float32.
WIRE_DTYPES = {torch.float16: torch.float16, torch.float32: torch.float32, torch.float64: torch.float64}


@dataclass(eq=False)
class Bucket:
    """Some parameters' gradients in one flat tensor, and a flag for each: was it used in this step?"""

    params: list[torch.nn.Parameter]
    names: list[str]
    views: list[torch.Tensor]  # of the channel's flat, each in its parameter's shape and memory format
    flags: torch.Tensor  # (len(params),), summed over ranks
    channel: Channel | Plain
    filled: set[int] = field(default_factory=set)  # indices of params whose gradient is in
    sent: bool = False


Named = list[tuple[str, torch.nn.Parameter]]


def make_buckets(named: Named, spec: Spec, key: Callable[[int], Key], size: int, average: bool) -> list[Bucket]:
    """Buckets of one dtype, device and codec each, the last parameters first, as backward finishes them.

    key: the randomness of the bucket with that number. Raises UserError if a layer of the spec matches no parameter,
    TypeError for a parameter that is not floating.
    """
    for beginning in spec.layers:
        if not any(name.startswith(beginning) for name, _ in named):
            names = ", ".join(sorted({name.rpartition(".")[0] or name for name, _ in named}))
            raise UserError(f"compression {spec.text!r}: no parameter begins with {beginning!r}; there are: {names}")
    groups: dict[tuple[torch.dtype, torch.device, str | None], Named] = {}
    for name, p in reversed(named):
        if p.is_complex() or p.dtype not in (*WIRE_DTYPES, torch.bfloat16):
            raise TypeError(f"{name} is {p.dtype}; float16, bfloat16, float32 and float64 can be exchanged")
        argument = spec.argument_for(name, p.numel(), p.dim())
        # Whoever encodes takes float32.
        dtype = WIRE_DTYPES.get(p.dtype, torch.float32) if argument is None else torch.float32
        groups.setdefault((dtype, p.device, argument), []).append((name, p))
    buckets: list[Bucket] = []
    for (dtype, _, argument), members in groups.items():
        limit = FIRST_BUCKET_BYTES
        while members:
            count, taken = 0, 0
            while count < len(members) and taken < limit:
                taken += members[count][1].numel() * dtype.itemsize
                count += 1
            part, members = members[:count], members[count:]
            bucket_key = key(len(buckets))
            if argument is None:
                buckets.append(plain_bucket(part, dtype, bucket_key.bucket, average))
            else:
                buckets.append(coded_bucket(part, spec, argument, bucket_key, size))
            limit = BUCKET_BYTES
    return buckets


def plain_bucket(members: Named, dtype: torch.dtype, number: int, average: bool) -> Bucket:
    """A bucket that is all-reduced as it is, with its flags behind the gradients."""
    params = [p for _, p in members]
    count = sum(p.numel() for p in params)
    flat = torch.zeros(count + len(params), dtype=dtype, device=params[0].device)
    channel = Plain(f"gradients.{number}", flat, ops.size(), average)
    return Bucket(params, [name for name, _ in members], make_views(flat, params), flat[count:], channel)


def coded_bucket(members: Named, spec: Spec, argument: str, key: Key, size: int) -> Bucket:
    """A bucket that a codec carries; its flags travel apart, exactly."""
    params = [p for _, p in members]
    device = params[0].device
    flat = torch.zeros(sum(p.numel() for p in params), device=device)
    shapes = [(p.shape[0], p.numel() // p.shape[0]) if p.dim() > 1 else (1, p.numel()) for p in params]
    codec = make_codec(spec, argument, shapes, key, device)
    channel = Channel(
        f"gradients.{key.bucket}",
        flat,
        codec,
        key,
        size,
        feedback=spec.feedback,
        warmup=spec.warmup,
        momentum=spec.momentum,
    )
    flags = torch.zeros(len(params), device=device)
    return Bucket(params, [name for name, _ in members], make_views(flat, params), flags, channel)


def make_views(flat: torch.Tensor, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The parameters' places in flat, one behind the other, in their own shapes and memory formats."""
    views, offset = [], 0
    for p in params:
        piece = flat[offset : offset + p.numel()]
        dense = torch.empty_like(p).stride() == p.stride()  # no gaps and no overlaps in its memory
        views.append(piece.as_strided(p.shape, p.stride(), piece.storage_offset()) if dense else piece.view(p.shape))
        offset += p.numel()
    return views
