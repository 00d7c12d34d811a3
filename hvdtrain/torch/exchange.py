"""The gradients' exchange: flat buckets, each all-reduced in place as soon as its gradients are in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from hvdtrain.collectives import ops

# The first bucket is small so that the network starts early in the backward pass.
FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20
# Horovod reduces no other floating type: these travel as float32.
WIRE_DTYPES = {torch.float16: torch.float16, torch.float32: torch.float32, torch.float64: torch.float64}


@dataclass(eq=False)
class Bucket:
    """Some parameters' gradients in one flat tensor, and one flag each behind them: was it used in this step?"""

    name: str
    params: list[torch.nn.Parameter]
    flat: torch.Tensor  # (sum of numel + len(params),)
    views: list[torch.Tensor]  # of flat, each in its parameter's shape and memory format
    flags: torch.Tensor  # (len(params),), of flat
    filled: set[int] = field(default_factory=set)  # indices of params whose gradient is in
    handle: ops.Handle | None = None


class Exchange:
    """All-reduces the gradients of `params` once per step, overlapping with the backward pass.

    In the backward pass that ends a step (`passes` of them make one step), each gradient is copied into its bucket
    when autograd has finished it, and a full bucket is sent. `finish` sends what is left, waits, and makes every
    `p.grad` a view of the reduced bucket. A parameter that no rank used keeps the gradient None, so that the
    optimizer leaves it alone as it would in a single process; one that only some ranks used counts as zero elsewhere.
    """

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], average: bool) -> None:
        self.average = average
        self.passes = 1
        self.waited = 0.0  # seconds that the last `finish` waited for communication
        self.buckets = _make_buckets([(name, p) for name, p in named if p.requires_grad])
        self._place = {p: (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.params)}
        self._remaining = dict.fromkeys(self._place, 1)  # backward passes until a gradient is finished
        for p in self._place:
            p.register_post_accumulate_grad_hook(self._make_hook(p))  # type: ignore[no-untyped-call]

    @property
    def payload_bytes(self) -> int:
        """Bytes that are all-reduced in a step."""
        return sum(bucket.flat.numel() * bucket.flat.element_size() for bucket in self.buckets)

    @property
    def in_flight(self) -> bool:
        return any(bucket.handle is not None for bucket in self.buckets)

    def set_passes(self, passes: int) -> None:
        """How many backward passes make the coming step on this rank: 0 where it has no examples."""
        self.passes = passes
        self._remaining = dict.fromkeys(self._place, passes)

    def _make_hook(self, p: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        bucket, index = self._place[p]

        def hook(_: torch.Tensor) -> None:
            self._remaining[p] -= 1
            if self._remaining[p] < 0 or bucket.handle is not None:
                raise RuntimeError(
                    f"a gradient of bucket {bucket.name} came after its exchange had begun: more backward passes than "
                    f"backward_passes_per_step={self.passes}; call optimizer.step() or raise that number"
                )
            if self._remaining[p] == 0:
                self._fill(bucket, index)
                if len(bucket.filled) == len(bucket.params):
                    self._send(bucket)

        return hook

    @staticmethod
    def _fill(bucket: Bucket, index: int) -> None:
        gradient = bucket.params[index].grad
        assert gradient is not None
        if gradient is not bucket.views[index]:
            bucket.views[index].copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            if gradient.dtype == bucket.flat.dtype:
                bucket.params[index].grad = bucket.views[index]
        bucket.filled.add(index)

    def _send(self, bucket: Bucket) -> None:
        bucket.flags.fill_(1)
        for index in range(len(bucket.params)):
            if index not in bucket.filled:
                bucket.views[index].zero_()
                bucket.flags[index] = 0
        bucket.handle = ops.all_reduce_async_(bucket.flat, bucket.name, self.average)

    def finish(self) -> None:
        """Send what is left, wait for all, and set every gradient. All ranks call it once per step."""
        for bucket in self.buckets:
            if bucket.handle is None:
                for index, p in enumerate(bucket.params):
                    # Used in some of this step's passes only: what has been accumulated is all there is.
                    if index not in bucket.filled and p.grad is not None:
                        self._fill(bucket, index)
                self._send(bucket)
        if self.buckets and self.buckets[0].flat.is_cuda:
            # Waiting for the backward pass's kernels is compute, not communication.
            torch.cuda.current_stream().synchronize()
        begin = time.perf_counter()
        for bucket in self.buckets:
            assert bucket.handle is not None
            ops.wait(bucket.handle)
        self.waited = time.perf_counter() - begin
        for bucket in self.buckets:
            missing = [index for index in range(len(bucket.params)) if index not in bucket.filled]
            used = bucket.flags.tolist() if missing else []
            for index, p in enumerate(bucket.params):
                if index in missing and not used[index]:
                    p.grad = None
                elif p.grad is not bucket.views[index]:
                    p.grad = bucket.views[index].to(p.dtype)  # the view itself where the types are the same
            bucket.handle = None
            bucket.filled.clear()
        self._remaining = dict.fromkeys(self._place, self.passes)


def _make_buckets(named: list[tuple[str, torch.nn.Parameter]]) -> list[Bucket]:
    """Cut the parameters, last first as backward finishes them, into buckets of one dtype and device."""
    buckets: list[Bucket] = []
    groups: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
    for _, p in reversed(named):
        if p.is_complex() or p.dtype not in (*WIRE_DTYPES, torch.bfloat16):
            raise TypeError(f"a parameter of dtype {p.dtype} cannot be exchanged; use float16, bfloat16, 32 or 64")
        groups.setdefault((p.dtype, p.device), []).append(p)
    for (dtype, _), params in groups.items():
        limit, taken = FIRST_BUCKET_BYTES, 0
        part: list[torch.nn.Parameter] = []
        for p in params:
            part.append(p)
            taken += p.numel() * p.element_size()
            if taken >= limit:
                buckets.append(_bucket(f"gradients.{len(buckets)}", part, dtype))
                limit, taken, part = BUCKET_BYTES, 0, []
        if part:
            buckets.append(_bucket(f"gradients.{len(buckets)}", part, dtype))
    return buckets


def _bucket(name: str, params: list[torch.nn.Parameter], dtype: torch.dtype) -> Bucket:
    count = sum(p.numel() for p in params)
    flat = torch.zeros(count + len(params), dtype=WIRE_DTYPES.get(dtype, torch.float32), device=params[0].device)
    views, offset = [], 0
    for p in params:
        piece = flat[offset : offset + p.numel()]
        dense = torch.empty_like(p).stride() == p.stride()  # no gaps and no overlaps in its memory
        views.append(piece.as_strided(p.shape, p.stride(), piece.storage_offset()) if dense else piece.view(p.shape))
        offset += p.numel()
    return Bucket(name, params, flat, views, flat[count:])
