"""The gradients' exchange: flat buckets, each of which is sent as soon as its gradients are in.

It sees torch parameters and their gradients, by autograd's hooks, and no optimizer: whoever calls `finish_exchange`
finds the sums in `p.grad`.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from hvdtrain.comm import collectives
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer
from hvdtrain.compression.spec import AUTO
from hvdtrain.exchange.advisor import Advisor
from hvdtrain.exchange.buckets import (
    SPARSE_FLAG,
    AwaitedSums,
    Bucket,
    ExchangeConfig,
    NamedParameters,
    check_dtype,
    check_parameters,
    real_numel,
)
from hvdtrain.exchange.layout import BucketLayout, expects_gradient
from hvdtrain.system.errors import UserError


class BucketedExchange(BucketLayout):
    """Sums or averages gradients over ranks once per step, overlapping with the backward pass.

        autograd's hook          a gradient is copied into its bucket;   a full bucket: `start_reduction`
        wait_for_sums            what is left is sent;   all second rounds;   all decoded
        finish_exchange          residuals are committed, if the step is made;   p.grad = view of the bucket

    A parameter that no rank used keeps the gradient None, so that the optimizer leaves it alone as it would in a single
    process; one that only some ranks used counts as zero on the others.

    Which parameters are trained may change at any time, as `requires_grad` says, and `add_parameter` brings new ones. A
    rank that has, or will have, a gradient of a parameter in no bucket that is sent sets `late` in those that are sent.
    Then all ranks agree at the end of the step on the names, and exchange these gradients too before it is over. The
    first step's buckets are made in this way as well, in the order in which its gradients became ready.

    Attributes:
        passes: backward passes that make a step on this rank, unless they are announced.
        steps: steps exchanged.
        waited: seconds that the last step waited for communication.
        backward_end: when `finish_exchange` was last called, by time.perf_counter.
        checks_finite: whether a step looks if all sums are finite even if no codec needs to know.
        sums_are_finite: what it saw in the last step; the same on all ranks.
        step_is_made: False, set on all ranks before `finish_exchange`: the sums will not be used, and residuals stay
            as they were.
        advisor: of compression "auto".
    """

    _open_exchanges: ClassVar[weakref.WeakSet[BucketedExchange]] = weakref.WeakSet()  # with hooks in place

    def __init__(self, named: NamedParameters, config: ExchangeConfig) -> None:
        """Put hooks on the parameters, on all ranks; buckets are made at the end of the first step.

        Args:
            named: names, the same on all ranks, and parameters of any dense memory format and floating type.
            config: how their gradients are summed.

        Raises:
            UserError: for a parameter whose type cannot be exchanged, or a layer that the specification names wrongly.
            ValueError: for a parameter that is in another exchange, which nobody has closed.
        """
        super().__init__(config)
        self.passes = 1
        self.steps = 0
        self.waited = 0.0
        self.backward_end = 0.0
        self.size = collectives.size(config.group)
        check_parameters(named, config.spec)
        taken = {p for other in self._open_exchanges for p in other.names}
        for name, p in named:
            if p in taken:
                raise ValueError(f"{name} is in another DistributedOptimizer already: call its exchange.close() first")
        self.checks_finite = False
        self.sums_are_finite = True
        self.step_is_made = True
        self.advisor = Advisor(self) if config.spec.method == AUTO else None
        # Finished gradients of parameters in no bucket that is sent, in the order in which they came.
        self._arrived: dict[torch.nn.Parameter, None] = {}
        # Whether one of those has, or will have, a gradient; None: not looked yet.
        self._has_late_gradients: bool | None = None
        self._repeated: set[torch.nn.Parameter] = set()  # whose gradients are finished only at the end of the pass
        self._remaining_passes: dict[torch.nn.Parameter, int] = {}  # backward passes until a gradient is finished
        self._is_last_pass: bool | None = None  # of the step; None: the caller does not announce passes
        self._paused = False
        self._awaited: AwaitedSums | None = None  # of the step, once they were waited for
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, p in named:
            self._register_parameter(name, p)
        self.inactive_params = list(self.names)
        self._open_exchanges.add(self)

    def _register_parameter(self, name: str, p: torch.nn.Parameter) -> None:
        """Put a hook on a parameter, also if it is frozen now."""
        self.names[p] = name
        if not (p.is_floating_point() or p.is_complex()):
            return  # it will never have a gradient
        self._remaining_passes[p] = self.passes
        trained = p.requires_grad
        p.requires_grad_(True)  # torch puts hooks on no others
        self._hooks.append(p.register_post_accumulate_grad_hook(self._make_hook(name, p)))  # type: ignore[no-untyped-call]
        p.requires_grad_(trained)

    def add_parameter(self, name: str, p: torch.nn.Parameter) -> None:
        """Add a parameter, on all ranks; when its first gradient comes, the ranks' values must be equal."""
        check_dtype(name, p)
        self._register_parameter(name, p)
        self.new_params.add(p)
        self.inactive_params.append(p)

    def close(self) -> None:
        """Take the hooks off the parameters, so that another exchange may have them. This one cannot be used again."""
        for hook in self._hooks:
            hook.remove()
        self._open_exchanges.discard(self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore backward passes: what they add to this exchange's gradients is not exchanged by them."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step, and received as many."""
        return sum(bucket.reducer.wire_bytes for bucket in self.active_buckets) + self.flags.wire_bytes

    @property
    def has_pending_gradients(self) -> bool:
        """Whether this rank has finished gradients that `finish_exchange` has not reduced yet."""
        return bool(self._arrived) or any(bucket.sent or bucket.filled for bucket in self.buckets)

    def set_passes(self, passes: int) -> None:
        """Set how many backward passes make the coming step on this rank: 0 if it has no examples."""
        self.passes = passes
        self._remaining_passes = dict.fromkeys(self._remaining_passes, passes)

    def announce_pass(self, last: bool) -> None:
        """Note that a backward pass begins, the step's last or not. A caller that announces one announces all."""
        self._is_last_pass = last

    def discard_gradients(self) -> None:
        """Drop the gradients since the last `finish_exchange`. Raises RuntimeError if some have been sent."""
        if any(bucket.sent for bucket in self.buckets):
            raise RuntimeError(
                "zero_grad() between backward() and step(): the gradients are being reduced. If that backward() was "
                "for another optimizer, run it within `with optimizer.paused():` of this one"
            )
        self._reset_step()

    def _reset_step(self) -> None:
        self._awaited = None
        self._arrived.clear()
        self._has_late_gradients = None
        for bucket in self.buckets:
            bucket.sent = False
            bucket.filled.clear()
        self._remaining_passes = dict.fromkeys(self._remaining_passes, self.passes)

    def _make_hook(self, name: str, p: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            if self._paused or self._is_last_pass is False:
                return
            if self._is_last_pass is None:
                self._remaining_passes[p] -= 1
                if self._remaining_passes[p] > 0:
                    return
                if self._remaining_passes[p] < 0:
                    self._raise_second_gradient(name)
            bucket, index = self.locations.get(p, (None, 0))
            if bucket is None:
                if p in self._arrived:
                    self._repeated.add(p)
                self._arrived[p] = None
            elif bucket.sent:
                self._raise_second_gradient(name)
            elif index in bucket.filled or p in self._repeated:
                bucket.filled.discard(index)
                self._repeated.add(p)
            else:
                self._store_gradient(bucket, index)
                if len(bucket.filled) == len(bucket.params):
                    self._send_bucket(bucket)
                for other in self.buckets:
                    if other.sent:
                        other.reducer.start_second_round(wait=False)

        return on_gradient

    def _raise_second_gradient(self, name: str) -> None:
        checkpointing = "activation checkpointing of a block that is used more than once needs use_reentrant=False"
        if self._is_last_pass is not None:
            raise UserError(f"a gradient of {name} came in two parts, the second after it was sent: {checkpointing}")
        raise RuntimeError(
            f"a gradient of {name} came after its exchange had begun: more backward passes than "
            f"backward_passes_per_step={self.passes}; call optimizer.step() or raise that number, run backward passes "
            f"for another optimizer within `with optimizer.paused():` of this one; and {checkpointing}"
        )

    def _store_gradient(self, bucket: Bucket, index: int) -> None:
        p, view = bucket.params[index], bucket.views[index]
        assert p.grad is not None
        bucket.flags[index] = SPARSE_FLAG if p.grad.is_sparse else 1
        # Rows of a sparse gradient (an embedding's) travel densely: so the sizes stay fixed.
        bucket.put_gradient(index, p.grad.to_dense() if p.grad.is_sparse else p.grad, self.steps)
        if p.grad is not view and p.grad.dtype == view.dtype:
            p.grad = view  # its memory can be used again at once
        bucket.filled.add(index)

    def _send_bucket(self, bucket: Bucket) -> None:
        bucket.ready_time = time.perf_counter()
        for index in range(len(bucket.params)):
            if index not in bucket.filled:
                bucket.put_gradient(index, None, self.steps)
                bucket.flags[index] = 0
        bucket.late_flag.fill_(self._check_late_gradients())
        if isinstance(bucket.reducer, CompressedReducer):
            bucket.reducer.start_reduction(self.steps, fused=bucket.reducer.fuses_residual(self.steps))
        else:
            bucket.reducer.start_reduction(self.steps)
        bucket.sent = True

    def _check_late_gradients(self) -> bool:
        """Return whether this rank has, or will have, gradients of parameters in no bucket that is sent."""
        if self._has_late_gradients is None:
            self._has_late_gradients = any(map(expects_gradient, self.inactive_params))
        return self._has_late_gradients

    def wait_for_sums(self) -> None:
        """Send what is left and wait for all; `finish_exchange` does it unless it was done. All ranks call it."""
        self.backward_end = time.perf_counter()
        self.waited = 0.0
        buckets = self.active_buckets
        late = bool(self.names) and (not self.build_orders or self._reduce_buckets(buckets, self.flags))
        if late:
            newcomers = self.add_newcomers(self._arrived.keys())
            self._has_late_gradients = False
            self._reduce_buckets(newcomers, self.join_flags(newcomers))
            buckets += newcomers
        elif self._arrived:
            names = ", ".join(self.names[p] for p in self._arrived)
            raise RuntimeError(
                f"{names} began to require a gradient in a backward pass: change that before or after it"
            )
        # The state of all buckets changes or of none: a step with anything that is not finite is not made.
        stateful = any(isinstance(b.reducer, CompressedReducer) or b.reducer.carried_over is not None for b in buckets)
        if stateful or self.checks_finite:
            self.sums_are_finite = all(bucket.reducer.sum_is_finite() for bucket in buckets)
        self._awaited = AwaitedSums(buckets, late, stateful)

    def finish_exchange(self) -> None:
        """Set every gradient to the sum over ranks. All ranks call it once per step."""
        if self._awaited is None:
            self.wait_for_sums()
        assert self._awaited is not None
        awaited, late = self._awaited, self._awaited.late
        for bucket in awaited.buckets:
            self._set_gradients(bucket, awaited.stateful and self.sums_are_finite and self.step_is_made)
        self._reset_step()
        self.step_is_made = True
        self.steps += 1
        if self.suspend_frozen() or late:
            self.refresh_layout()
        if self.advisor is not None:
            if late:
                self.advisor.restart_trials()
            self.advisor.advance_trials()

    def _reduce_buckets(self, buckets: list[Bucket], flags: PlainReducer) -> bool:
        """Send what is left of the buckets and wait for all; return whether a rank has gradients in no bucket."""
        for bucket in buckets:
            if not bucket.sent:
                for index, p in enumerate(bucket.params):
                    # Used in some of this step's passes only: it has been accumulated all the same.
                    if index not in bucket.filled and p.grad is not None:
                        self._store_gradient(bucket, index)
                self._send_bucket(bucket)
        if len(flags.flat):
            flags.flat[0] = self._check_late_gradients()
            flags.start_reduction(self.steps)
        if buckets and buckets[0].views[0].is_cuda:
            # Waiting for the backward pass's kernels is compute, not communication.
            torch.cuda.current_stream().synchronize()
        begin = time.perf_counter()
        # All second rounds are under way before any is waited for.
        for bucket in buckets:
            bucket.reducer.start_second_round()
        # In the order in which they were sent: what has arrived is decoded while a slower rank sends its last.
        for bucket in buckets:
            bucket.reducer.finish_reduction()
        if len(flags.flat):
            flags.finish_reduction()
        self.waited += time.perf_counter() - begin
        return bool(flags.flat[0] if len(flags.flat) else buckets[0].late_flag)

    def _set_gradients(self, bucket: Bucket, committed: bool) -> None:
        used = (bucket.flags if bucket.compressible or not self.average else bucket.flags * self.size).tolist()
        bucket.idle_steps = 0 if any(used) else bucket.idle_steps + 1
        if committed:
            ends = itertools.accumulate(real_numel(p) for p in bucket.params)
            parts = zip(ends, bucket.params, used, strict=True)
            bucket.reducer.commit_step([(end - real_numel(p), end) for end, p, ranks in parts if ranks == 0])
        bucket.set_gradients(used)
