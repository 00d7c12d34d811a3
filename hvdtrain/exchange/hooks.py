"""Autograd's hooks of an exchange: which gradients are finished in a backward pass.

Knows parameters and buckets; what is done with a gradient, a subclass knows.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from hvdtrain.comm.torch_group import is_lost_peer
from hvdtrain.exchange.buckets import Bucket, ExchangeConfig
from hvdtrain.exchange.layout import BucketLayout
from hvdtrain.exchange.mistakes import second_gradient_error
from hvdtrain.exchange.parameter_checks import check_dtype
from hvdtrain.exchange.partition import NamedParameters


class GradientHooks(BucketLayout):
    """A layout whose parameters have hooks.

    With several exchanges in a process, a backward pass may be for the others alone, as a generator's through its
    discriminator. So one without a name of its own, whose passes are not announced, then leaves finished gradients
    where they are, in `p.grad`, until the step; others store and send each at once.

    Attributes:
        passes: backward passes that make a step on this rank, unless they are announced.
        arrived: parameters in no bucket that is sent whose gradients are finished, in that order.
        has_gradients: whether any gradient has come since the last step, finished or not.
        has_pending_gradients: whether this rank has finished gradients that no step has reduced yet.
        shares_parameters: whether others have parts of its parameters, and need this rank in its backward pass.
        lost_peer: the error by which sending has failed in such a pass, to be raised after it.
    """

    _open_exchanges: ClassVar[weakref.WeakSet[GradientHooks]] = weakref.WeakSet()  # with hooks in place

    def __init__(self, config: ExchangeConfig) -> None:
        super().__init__(config)
        self.passes = 1
        self.arrived: dict[torch.nn.Parameter, None] = {}
        self.has_gradients = self.has_pending_gradients = False
        self.shares_parameters = False
        self.lost_peer: Exception | None = None
        self._repeated: set[torch.nn.Parameter] = set()  # whose gradients are finished only at the end of the pass
        self._remaining_passes: dict[torch.nn.Parameter, int] = {}  # backward passes until a gradient is finished
        self._is_last_pass: bool | None = None  # of the step; None: the caller does not announce passes
        self._paused = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._on_gradient: dict[torch.nn.Parameter, Callable[[torch.Tensor], None]] = {}

    @property
    def sends_early(self) -> bool:
        """Whether gradients are sent during the backward pass: all that come are this exchange's own."""
        return bool(self._is_last_pass is not None or self.config.name or len(self._open_exchanges) < 2)

    def register_parameters(self, named: NamedParameters) -> None:
        """Put hooks on the parameters. Raises ValueError for one that is in another exchange, which is not closed."""
        taken = {p for other in self._open_exchanges for p in other.names}
        for name, p in named:
            if p in taken:
                raise ValueError(f"{name} is in another DistributedOptimizer already: call its exchange.close() first")
        if self._open_exchanges and not self.config.name:
            gc.collect()  # those of models that nobody has any more
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
        self._on_gradient[p] = self._make_hook(name, p)
        self._hooks.append(p.register_post_accumulate_grad_hook(self._on_gradient[p]))  # type: ignore[no-untyped-call]
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
        if self.config.round_order is not None:
            self.config.round_order.groups.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore backward passes: what they add to this exchange's gradients is not exchanged by them."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def set_passes(self, passes: int) -> None:
        """Set how many backward passes make the coming step on this rank: 0 if it has no examples."""
        self.passes = passes
        self._remaining_passes = dict.fromkeys(self._remaining_passes, passes)

    def reset_arrivals(self) -> None:
        """Wait for the gradients of the next step."""
        self.arrived.clear()
        self.has_gradients = self.has_pending_gradients = False
        self._remaining_passes = dict.fromkeys(self._remaining_passes, self.passes)

    def collect_gradients(self) -> None:
        """Take the gradients that are there as finished, after a last pass that did not go through autograd's hooks."""
        self._is_last_pass = True
        for p, on_gradient in self._on_gradient.items():
            bucket, index = self.locations.get(p, (None, 0))
            if p.grad is not None and p not in self.arrived and (bucket is None or index not in bucket.filled):
                on_gradient(p.grad)

    def announce_pass(self, last: bool) -> None:
        """Note that a backward pass begins, the step's last or not. A caller that announces one announces all."""
        self._is_last_pass = last

    def _make_hook(self, name: str, p: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            if self._paused or self._is_last_pass is False:
                return
            self.has_gradients = True
            sends_early = self.sends_early
            if self._is_last_pass is None:
                self._remaining_passes[p] -= 1
                if self._remaining_passes[p] > 0:
                    return
                if self._remaining_passes[p] < 0 and sends_early:
                    raise second_gradient_error(name, self.passes, announced=False)
            self.has_pending_gradients = True
            bucket, index = self.locations.get(p, (None, 0))
            if bucket is None:
                if p in self.arrived and sends_early:
                    self._repeated.add(p)
                self.arrived[p] = None
            elif bucket.sent:
                raise second_gradient_error(name, self.passes, announced=self._is_last_pass is not None)
            elif index in bucket.filled or p in self._repeated:
                bucket.filled.discard(index)
                self._repeated.add(p)
            elif sends_early:
                self.store_gradient(bucket, index)
                if self.lost_peer is None:
                    self._send_ready(bucket)

        return on_gradient

    def _send_ready(self, bucket: Bucket) -> None:
        """Send a bucket if it is full, and start second rounds."""
        try:
            if len(bucket.filled) == len(bucket.params):
                self.send_bucket(bucket)
            for other in self.buckets:
                if other.sent:
                    other.reducer.start_second_round(wait=False)
        except Exception as error:
            if not self.shares_parameters or not is_lost_peer(error):
                raise
            self.lost_peer = error

    def store_gradient(self, bucket: Bucket, index: int) -> None:
        """Take the finished gradient of the bucket's parameter with that index into the bucket."""
        raise NotImplementedError

    def send_bucket(self, bucket: Bucket, *, dropped: bool = False) -> None:
        """Start summing a bucket over ranks. dropped: all ranks drop the sums."""
        raise NotImplementedError
