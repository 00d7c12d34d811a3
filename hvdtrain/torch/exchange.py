"""The gradients' exchange: flat buckets, each on its way as soon as its gradients are in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from hvdtrain.collectives import ops
from hvdtrain.compression.channel import Channel, Plain
from hvdtrain.compression.codec import Key
from hvdtrain.compression.spec import Spec
from hvdtrain.torch.buckets import Bucket, Named, make_buckets

# What a sparse gradient adds to its flag instead of 1; float16 holds the sum for a thousand ranks.
SPARSE = 1 / 1024


class Exchange:
    """Reduces the gradients of `named` over ranks once per step, overlapping with the backward pass.

    In the backward pass that ends a step (`passes` of them make one step), each gradient is copied into its bucket
    when autograd has finished it, and a full bucket is sent. `finish` sends what is left, waits, and makes every
    `p.grad` a view of the reduced bucket. A parameter that no rank used keeps the gradient None, so that the
    optimizer leaves it alone as it would in a single process; one that only some ranks used counts as zero elsewhere.
    """

    def __init__(self, named: Named, average: bool, spec: Spec, seed: int = 0) -> None:
        self.average = average
        self.passes = 1
        self.steps = 0
        self.waited = 0.0  # seconds that the last `finish` waited for communication
        rank, self.size = ops.rank(), ops.size()
        trained = [(name, p) for name, p in named if p.requires_grad]
        self.buckets = make_buckets(trained, spec, lambda number: Key(seed, 0, number, rank), self.size, average)
        self.coded = [bucket for bucket in self.buckets if isinstance(bucket.channel, Channel)]
        # The flags of buckets that a codec carries, joined.
        self.flags = Plain("gradients.flags", torch.zeros(0), self.size, average=False)
        if self.coded:
            self.flags.flat = torch.cat([bucket.flags for bucket in self.coded])
            pieces = torch.split(self.flags.flat, [len(bucket.params) for bucket in self.coded])
            for bucket, piece in zip(self.coded, pieces, strict=True):
                bucket.flags = piece
        self._place = {p: (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.params)}
        self._remaining = dict.fromkeys(self._place, 1)  # backward passes until a gradient is finished
        for p in self._place:
            p.register_post_accumulate_grad_hook(self._make_hook(p))  # type: ignore[no-untyped-call]

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step, and receives as many."""
        return sum(bucket.channel.wire_bytes for bucket in self.buckets) + self.flags.wire_bytes

    @property
    def pending(self) -> bool:
        """Whether there are finished gradients of this rank that `finish` has not reduced yet."""
        return any(bucket.sent or bucket.filled for bucket in self.buckets)

    def set_passes(self, passes: int) -> None:
        """How many backward passes make the coming step on this rank: 0 where it has no examples."""
        self.passes = passes
        self._remaining = dict.fromkeys(self._place, passes)

    def _make_hook(self, p: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        bucket, index = self._place[p]

        def hook(_: torch.Tensor) -> None:
            self._remaining[p] -= 1
            if self._remaining[p] < 0 or bucket.sent:
                raise RuntimeError(
                    f"a gradient of {bucket.names[index]} came after its exchange had begun: more backward passes "
                    f"than backward_passes_per_step={self.passes}; call optimizer.step() or raise that number"
                )
            if self._remaining[p] == 0:
                self._fill(bucket, index)
                if len(bucket.filled) == len(bucket.params):
                    self._send(bucket)

        return hook

    @staticmethod
    def _fill(bucket: Bucket, index: int) -> None:
        p, view = bucket.params[index], bucket.views[index]
        assert p.grad is not None
        bucket.flags[index] = SPARSE if p.grad.is_sparse else 1
        if p.grad is not view:
            # Rows of a sparse gradient (an embedding's) travel densely: one way for all, and the sizes stay fixed.
            view.copy_(p.grad.to_dense() if p.grad.is_sparse else p.grad)
            if p.grad.dtype == view.dtype:
                p.grad = view
        bucket.filled.add(index)

    def _send(self, bucket: Bucket) -> None:
        for index in range(len(bucket.params)):
            if index not in bucket.filled:
                bucket.views[index].zero_()
                bucket.flags[index] = 0
        bucket.channel.start(self.steps)
        bucket.sent = True

    def finish(self) -> None:
        """Send what is left, wait for all, and set every gradient. All ranks call it once per step."""
        for bucket in self.buckets:
            if not bucket.sent:
                for index, p in enumerate(bucket.params):
                    # Used in some of this step's passes only: what has been accumulated is all there is.
                    if index not in bucket.filled and p.grad is not None:
                        self._fill(bucket, index)
                self._send(bucket)
        if self.coded:
            self.flags.start(self.steps)
        if self.buckets and self.buckets[0].views[0].is_cuda:
            # Waiting for the backward pass's kernels is compute, not communication.
            torch.cuda.current_stream().synchronize()
        begin = time.perf_counter()
        # All second rounds are under way before any is waited for.
        for bucket in self.buckets:
            bucket.channel.turn()
        if self.coded:
            self.flags.finish()
        for bucket in self.buckets:
            bucket.channel.finish()
        self.waited = time.perf_counter() - begin
        # All memories or none: a step with anything that is not finite is not made.
        committed = bool(self.coded) and all(bucket.channel.finite() for bucket in self.buckets)
        for bucket in self.coded if committed else ():
            assert isinstance(bucket.channel, Channel)
            bucket.channel.commit()
        for bucket in self.buckets:
            self._set_gradients(bucket, committed)
            bucket.sent = False
            bucket.filled.clear()
        self.steps += 1
        self._remaining = dict.fromkeys(self._place, self.passes)

    def _set_gradients(self, bucket: Bucket, committed: bool) -> None:
        averaged = self.average and not isinstance(bucket.channel, Channel)
        used = (bucket.flags * self.size if averaged else bucket.flags).tolist()
        if committed and isinstance(bucket.channel, Channel) and 0 in used:
            ends = list(itertools.accumulate(p.numel() for p in bucket.params))
            for end, p, ranks in zip(ends, bucket.params, used, strict=True):
                if ranks == 0:
                    bucket.channel.owe(end - p.numel(), end)
        if self.average and isinstance(bucket.channel, Channel):
            bucket.channel.flat.div_(self.size)
        for p, view, ranks in zip(bucket.params, bucket.views, used, strict=True):
            if ranks == 0:
                p.grad = None
            elif ranks < 1:  # sparse wherever it was used: optimizers for sparse gradients take no others
                p.grad = view.to(p.dtype).to_sparse(1)
            elif p.grad is not view:
                p.grad = view.to(p.dtype)  # the view itself where the types are the same
