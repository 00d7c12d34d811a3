"""The gradients' exchange: flat buckets, each of which is sent as soon as its gradients are in.

It sees torch parameters and their gradients, by autograd's hooks, and no optimizer: whoever calls `finish_exchange`
finds the sums in `p.grad`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from hvdtrain.comm import collectives
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer
from hvdtrain.compression.scatter_reducer import PartOwner
from hvdtrain.compression.spec import AUTO, NONE
from hvdtrain.exchange.advisor import Advisor
from hvdtrain.exchange.buckets import HEAD_SIZE, SPARSE_FLAG, Bucket, ExchangeConfig
from hvdtrain.exchange.hooks import GradientHooks
from hvdtrain.exchange.layout import expects_gradient
from hvdtrain.exchange.local_tensors import is_dtensor, local_gradient, wrap_local
from hvdtrain.exchange.mistakes import check_same_round
from hvdtrain.exchange.parameter_checks import check_parameters
from hvdtrain.exchange.partition import NamedParameters


@dataclass(frozen=True)
class AwaitedSums:
    """A step's sums over ranks that have arrived."""

    buckets: list[Bucket]
    late: bool  # some are of parameters that were in no bucket that is sent
    stateful: bool  # some reducer keeps something for the next step


class BucketedExchange(GradientHooks):
    """Sums or averages gradients over ranks once per step, overlapping with the backward pass.

        autograd's hook          a gradient is copied into its bucket;   a full bucket: `start_reduction`
        wait_for_sums            what is left is sent;   all second rounds;   all decoded
        finish_exchange          residuals are committed, if the step is made;   p.grad = view of the bucket
        discard_gradients        what is left is sent as zeros, if anything has been;   all decoded, nothing is kept

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
        self.waited = 0.0
        self.backward_end = 0.0
        check_parameters(named, config.spec)
        self.checks_finite = False
        self.sums_are_finite = True
        self.step_is_made = True
        self.advisor = Advisor(self) if config.spec.method == AUTO else None
        # Whether a parameter in no bucket that is sent has, or will have, a gradient; None: not looked yet.
        self._has_late_gradients: bool | None = None
        self._steps_are_odd = False  # those whose sums were used
        self._awaited: AwaitedSums | None = None  # of the step, once they were waited for
        self.shares_parameters = any(is_dtensor(p) for _, p in named)
        self._holds_parts = config.spec.method != NONE and self.shares_parameters
        self.register_parameters(named)

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step, and received as many."""
        return sum(bucket.reducer.wire_bytes for bucket in self.active_buckets) + self.flags.wire_bytes

    def discard_gradients(self, *, unused_sums: bool = False) -> None:
        """Drop the gradients since the last `finish_exchange`, on all ranks if any can have been sent.

        Args:
            unused_sums: whether the last `finish_exchange` was in vain, too: no step was made with its sums.
        """
        self._steps_are_odd ^= unused_sums
        is_sent = any(bucket.sent for bucket in self.buckets)
        if self._awaited is None and (is_sent or (self.has_gradients and self.sends_early and self.buckets)):
            self._reduce_buckets(self.active_buckets, self.flags, dropped=True)
        self._reset_step()

    def _reset_step(self) -> None:
        self._awaited = None
        self._has_late_gradients = None
        for bucket in self.buckets:
            bucket.sent = False
            bucket.filled.clear()
        self.reset_arrivals()

    def store_gradient(self, bucket: Bucket, index: int) -> None:
        p, view = bucket.params[index], bucket.views[index]
        assert p.grad is not None
        gradient = local_gradient(p)
        bucket.flags[index] = SPARSE_FLAG if gradient.is_sparse else 1
        # Rows of a sparse gradient (an embedding's) travel densely: so the sizes stay fixed.
        bucket.put_gradient(index, gradient.to_dense() if gradient.is_sparse else gradient, self.steps)
        if gradient is not view and gradient.dtype == view.dtype:
            p.grad = wrap_local(view, p)  # its memory can be used again at once
        bucket.filled.add(index)

    def send_bucket(self, bucket: Bucket, *, dropped: bool = False) -> None:
        bucket.ready_time = time.perf_counter()
        for index in range(len(bucket.params)):
            if index not in bucket.filled:
                bucket.put_gradient(index, None, self.steps)
                bucket.flags[index] = 0
        if not bucket.compressible:
            self._fill_head(bucket.head, dropped)
        bucket.start_reduction(self.steps)
        bucket.sent = True
        if isinstance(bucket.reducer, PartOwner):
            for p in bucket.params:
                p.grad = None  # the sum will be on several ranks

    def _fill_head(self, head: torch.Tensor, dropped: bool) -> None:
        head[0] = self._check_late_gradients()
        head[1] = self._steps_are_odd != dropped

    def _check_late_gradients(self) -> bool:
        """Return whether this rank has, or will have, gradients of parameters in no bucket that is sent."""
        if self._has_late_gradients is None:
            self._has_late_gradients = any(map(expects_gradient, self.inactive_params))
        return self._has_late_gradients

    def wait_for_sums(self) -> None:
        """Send what is left and wait for all; `finish_exchange` does it unless it was done. All ranks call it."""
        if (lost := self.lost_peer) is not None:
            self.lost_peer = None
            raise lost
        self.backward_end = time.perf_counter()
        self.waited = 0.0
        buckets = self.active_buckets
        late = bool(self.names) and (not self.build_orders or self._reduce_buckets(buckets, self.flags))
        if late:
            newcomers = self.add_newcomers(self.arrived.keys())
            self._has_late_gradients = False
            self.order_rounds(newcomers)
            self._reduce_buckets(newcomers, self.join_flags(newcomers))
            buckets += newcomers
        elif self.arrived:
            names = ", ".join(self.names[p] for p in self.arrived)
            raise RuntimeError(
                f"{names} began to require a gradient in a backward pass: change that before or after it"
            )
        # The state of all buckets changes or of none: a step with anything that is not finite is not made.
        stateful = any(isinstance(b.reducer, CompressedReducer) or b.reducer.carried_over is not None for b in buckets)
        if stateful or self.checks_finite or self._holds_parts:
            self.sums_are_finite = all(bucket.reducer.sum_is_finite() for bucket in buckets)
            has_parts = self._holds_parts or (stateful and self.config.partition is not None)
            if has_parts:  # each rank has looked at its own
                odd = np.array([not self.sums_are_finite], dtype=np.float64)
                self.sums_are_finite = not collectives.sum_float64(odd, f"{self.config.name}gradients.finite")[0]
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
        self._steps_are_odd = not self._steps_are_odd
        if self.suspend_frozen() or late:
            self.refresh_layout()
        if self.advisor is not None:
            if late:
                self.advisor.restart_trials()
            self.advisor.advance_trials()

    def _reduce_buckets(self, buckets: list[Bucket], flags: PlainReducer, dropped: bool = False) -> bool:
        """Send what is left of the buckets and wait for all; return whether a rank has gradients in no bucket.

        dropped: what is left is sent as zeros, as all ranks drop the sums.

        Raises:
            RunError: this rank uses the sums, and another one drops them.
        """
        for bucket in buckets:
            if not bucket.sent:
                if dropped:
                    bucket.filled.clear()
                for index, p in enumerate(bucket.params):
                    # Used in some of this step's passes only: it has been accumulated all the same.
                    if index not in bucket.filled and p.grad is not None and not dropped:
                        self.store_gradient(bucket, index)
                self.send_bucket(bucket, dropped=dropped)
        if len(flags.flat):
            self._fill_head(flags.flat[:HEAD_SIZE], dropped)
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
        if not dropped:
            check_same_round([b.head for b in buckets if not b.compressible], self.size, averaged=self.average)
            check_same_round([flags.flat] if len(flags.flat) else [], self.size, averaged=False)
        return bool(flags.flat[0] if len(flags.flat) else buckets[0].head[0])

    def _set_gradients(self, bucket: Bucket, committed: bool) -> None:
        used = (bucket.flags if bucket.compressible or not self.average else bucket.flags * self.size).tolist()
        bucket.idle_steps = 0 if any(used) else bucket.idle_steps + 1
        if committed:
            bucket.commit_step(used)
        bucket.set_gradients(used)
