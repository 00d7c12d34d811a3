"""The gradients' exchange: flat buckets, each on its way as soon as its gradients are in."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from hvdtrain.collectives import ops
from hvdtrain.compression.channel import Channel, Plain
from hvdtrain.compression.spec import Spec
from hvdtrain.torch.buckets import Bucket, Named, check, make_buckets

# What a sparse gradient adds to its flag instead of 1; 900 ranks together add less than one dense gradient. A mean
# times the number of ranks is not quite the sum: 41 ranks of which one has a dense gradient make 0.99999994.
SPARSE = 1 / 1024


class Exchange:
    """Reduces the gradients of `named` over ranks once per step, overlapping with the backward pass.

    In the backward pass that ends a step (`passes` of them make one step), each gradient is copied into its bucket
    when autograd has finished it, and a full bucket is sent. `finish` sends what is left, waits, and makes every
    `p.grad` a view of the reduced bucket. A parameter that no rank used keeps the gradient None, so that the
    optimizer leaves it alone as it would in a single process; one that only some ranks used counts as zero elsewhere.
    A parameter is in one exchange at a time: ValueError names one that is in another, which nobody has closed.

    Buckets are made at the end of the first step, in the order in which its gradients became ready; that step sends
    nothing before its end.
    """

    _open: ClassVar[weakref.WeakSet[Exchange]] = weakref.WeakSet()  # those whose hooks are in place

    def __init__(
        self,
        named: Named,
        average: bool,
        spec: Spec,
        seed: int = 0,
        group: ops.Group = None,
        bucket_bytes: int | None = None,
    ) -> None:
        self.average, self.spec, self.seed, self.group, self.bucket_bytes = average, spec, seed, group, bucket_bytes
        self.passes = 1
        self.steps = 0
        self.waited = 0.0  # seconds that the last `finish` waited for communication
        self.backward_end = 0.0  # when the last `finish` was called, by time.perf_counter
        self.size = ops.size(group)
        self.named = [(name, p) for name, p in named if p.requires_grad]
        check(self.named, spec)
        taken = {p for other in self._open for _, p in other.named}
        for name, p in self.named:
            if p in taken:
                raise ValueError(f"{name} is in another DistributedOptimizer already: call its exchange.close() first")
        self.buckets: list[Bucket] = []
        # The flags of buckets that a codec may carry, joined.
        self.flags = Plain("gradients.flags", torch.zeros(0), average=False, group=group)
        self.advisor = None
        if spec.method == "auto":
            from hvdtrain.torch.advisor import Advisor

            self.advisor = Advisor(self)
        self._arrived: list[int] = []  # places in `named`, in the order of the first step
        self._place: dict[torch.nn.Parameter, tuple[Bucket, int]] = {}
        self._remaining = {p: 1 for _, p in self.named}  # backward passes until a gradient is finished
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._make_hook(i, name, p))  # type: ignore[no-untyped-call]
            for i, (name, p) in enumerate(self.named)
        ]
        self._open.add(self)

    def close(self) -> None:
        """Leave the parameters, to which another exchange may come then; this one is of no more use."""
        for hook in self._hooks:
            hook.remove()
        self._open.discard(self)

    def build(self, order: list[str]) -> None:
        """Make the buckets. order: names, the first that became ready first; those that are not in it come last."""
        by_name = dict(self.named)
        rest = [name for name, _ in reversed(self.named) if name not in set(order)]
        ordered = [(name, by_name[name]) for name in [*order, *rest] if name in by_name]
        self.buckets = make_buckets(ordered, self.spec, self.seed, self.group, self.average, self.bucket_bytes)
        apart = [bucket for bucket in self.buckets if bucket.coded]
        if apart:
            self.flags.flat = torch.cat([bucket.flags for bucket in apart])
            pieces = torch.split(self.flags.flat, [len(bucket.params) for bucket in apart])
            for bucket, piece in zip(apart, pieces, strict=True):
                bucket.flags = piece
        self._place = {p: (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.params)}

    @property
    def order(self) -> list[str]:
        """The parameters' names as they stand in the buckets."""
        return [name for bucket in self.buckets for name in bucket.names]

    @property
    def compressed(self) -> list[Bucket]:
        """The buckets that a codec carries."""
        return [bucket for bucket in self.buckets if isinstance(bucket.channel, Channel)]

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step, and received as many."""
        return sum(bucket.channel.wire_bytes for bucket in self.buckets) + self.flags.wire_bytes

    @property
    def pending(self) -> bool:
        """Whether there are finished gradients of this rank that `finish` has not reduced yet."""
        return bool(self._arrived) or any(bucket.sent or bucket.filled for bucket in self.buckets)

    def report(self) -> list[dict[str, Any]]:
        """The buckets as they are sent, for people: sizes in values and in bytes on this rank's wire per step."""
        return [
            {
                "parameters": len(bucket.params),
                "values": sum(p.numel() for p in bucket.params),
                "compression": bucket.method,
                "bytes_sent": bucket.channel.wire_bytes,
                "bytes_received": bucket.channel.wire_bytes,  # rings and exchanges are symmetric
            }
            for bucket in self.buckets
        ]

    def set_passes(self, passes: int) -> None:
        """How many backward passes make the coming step on this rank: 0 where it has no examples."""
        self.passes = passes
        self._remaining = dict.fromkeys(self._remaining, passes)

    def _make_hook(self, number: int, name: str, p: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            self._remaining[p] -= 1
            bucket, index = self._place.get(p, (None, 0))
            if self._remaining[p] < 0 or (bucket is not None and bucket.sent):
                raise RuntimeError(
                    f"a gradient of {name} came after its exchange had begun: more backward passes "
                    f"than backward_passes_per_step={self.passes}; call optimizer.step() or raise that number"
                )
            if self._remaining[p] == 0:
                if bucket is None:
                    self._arrived.append(number)
                    return
                self._fill(bucket, index)
                if len(bucket.filled) == len(bucket.params):
                    self._send(bucket)
                for other in self.buckets:
                    if other.sent:
                        other.channel.turn(wait=False)

        return hook

    def _fill(self, bucket: Bucket, index: int) -> None:
        p, view = bucket.params[index], bucket.views[index]
        assert p.grad is not None
        bucket.flags[index] = SPARSE if p.grad.is_sparse else 1
        # Rows of a sparse gradient (an embedding's) travel densely: one way for all, and the sizes stay fixed.
        bucket.put(index, p.grad.to_dense() if p.grad.is_sparse else p.grad, self.steps)
        if p.grad is not view and p.grad.dtype == view.dtype:
            p.grad = view  # its memory is of use again at once
        bucket.filled.add(index)

    def _send(self, bucket: Bucket) -> None:
        bucket.ready = time.perf_counter()
        for index in range(len(bucket.params)):
            if index not in bucket.filled:
                bucket.put(index, None, self.steps)
                bucket.flags[index] = 0
        if isinstance(bucket.channel, Channel):
            bucket.channel.start(self.steps, added_up=bucket.channel.adds_up(self.steps))
        else:
            bucket.channel.start(self.steps)
        bucket.sent = True

    def _agree_on_order(self) -> None:
        """Make the buckets in the order of the first rank that had examples; ranks may differ."""
        orders = ops.gather_json(self._arrived, "gradients.order", self.group)
        self.build([self.named[i][0] for i in max(orders, key=len)])
        self._arrived = []

    def finish(self) -> None:
        """Send what is left, wait for all, and set every gradient. All ranks call it once per step."""
        self.backward_end = time.perf_counter()
        if not self.buckets and self.named:
            self._agree_on_order()
        for bucket in self.buckets:
            if not bucket.sent:
                for index, p in enumerate(bucket.params):
                    # Used in some of this step's passes only: what has been accumulated is all there is.
                    if index not in bucket.filled and p.grad is not None:
                        self._fill(bucket, index)
                self._send(bucket)
        if len(self.flags.flat):
            self.flags.start(self.steps)
        if self.buckets and self.buckets[0].views[0].is_cuda:
            # Waiting for the backward pass's kernels is compute, not communication.
            torch.cuda.current_stream().synchronize()
        begin = time.perf_counter()
        # All second rounds are under way before any is waited for.
        for bucket in self.buckets:
            bucket.channel.turn()
        # In the order in which they were sent: what has arrived is decoded while a slower rank sends its last.
        for bucket in self.buckets:
            bucket.channel.finish()
        if len(self.flags.flat):
            self.flags.finish()
        self.waited = time.perf_counter() - begin
        # All memories or none: a step with anything that is not finite is not made.
        remembers = bool(self.compressed) or any(bucket.channel.owed is not None for bucket in self.buckets)
        committed = remembers and all(bucket.channel.finite() for bucket in self.buckets)
        for bucket in self.buckets:
            self._set_gradients(bucket, committed)
            bucket.sent = False
            bucket.filled.clear()
        self.steps += 1
        self._remaining = dict.fromkeys(self._remaining, self.passes)
        if self.advisor is not None:
            self.advisor.after_step()

    def _set_gradients(self, bucket: Bucket, committed: bool) -> None:
        used = (bucket.flags if bucket.coded or not self.average else bucket.flags * self.size).tolist()
        if committed:
            ends = itertools.accumulate(p.numel() for p in bucket.params)
            places = zip(ends, bucket.params, used, strict=True)
            bucket.channel.commit([(end - p.numel(), end) for end, p, ranks in places if ranks == 0])
        for p, view, ranks in zip(bucket.params, bucket.views, used, strict=True):
            if ranks == 0:
                p.grad = None
            elif ranks < 0.9:  # sparse wherever it was used: optimizers for sparse gradients take no others
                p.grad = view.to(p.dtype).to_sparse(1)
            elif p.grad is not view:
                p.grad = view.to(p.dtype)  # the view itself where the types are the same
