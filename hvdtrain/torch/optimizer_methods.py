"""The methods of a DistributedOptimizer: functions that `hvdtrain.torch.optimizer` puts into the class.

`self` is the user's optimizer, whose class is Horovod's DistributedOptimizer on top of its own. `self.exchange` is
hvdtrain's exchange of gradients; None on one rank, and if Horovod's own is in use.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from hvdtrain.comm import horovod as hvd
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.sharded import ShardedExchange
from hvdtrain.torch.broadcast import load_in_place
from hvdtrain.torch.hyperparameters import ParamGroup, StateDict
from hvdtrain.torch.stock_exchange import is_stock_exchange, reject_stock_exchange, synchronize_stock_exchange


class WrappedOptimizer(torch.optim.Optimizer):
    """What a wrapped optimizer has, for type checkers. Its class is another, made when it is wrapped.

    Attributes:
        exchange: hvdtrain's; None on one rank (without shards), and if Horovod's own is in use.
        waited: seconds that the last step waited for communication.
        wire_bytes: bytes that this rank sent in the last step.
    """

    exchange: BucketedExchange | ShardedExchange | None
    waited: float
    wire_bytes: int
    _synchronized: bool  # the gradients are reduced, and no step was made with them yet

    def synchronize(self) -> None:
        """See `synchronize`."""
        raise NotImplementedError

    def set_backward_passes_per_step(self, passes: int) -> None:
        """See `set_backward_passes`."""
        raise NotImplementedError


def register_hooks(self: Any) -> None:
    """Make the exchange; called by Horovod's constructor if there is more than one rank."""
    # _parameter_names is sorted by name; the optimizer's own order is the model's, and so backward's reversed.
    params = [p for group in self.param_groups for p in group["params"]]
    self.exchange = self._make_exchange([(self._parameter_names[p], p) for p in params])
    set_backward_passes(self, self.backward_passes_per_step)


def set_backward_passes(self: Any, passes: int) -> None:
    """Set how many backward passes this rank makes before the next step: ranks may differ, and 0 is allowed."""
    self.backward_passes_per_step = passes
    if isinstance(self.exchange, BucketedExchange):  # for others the caller announces what a pass belongs to
        self.exchange.set_passes(passes)


def synchronize(self: Any) -> None:
    """Wait until the gradients are reduced; once per step, on all ranks. Nothing to do if it was done."""
    if self._synchronized and not (self.exchange is not None and self.exchange.has_pending_gradients):
        return
    if self.exchange is not None:
        self.exchange.finish_exchange()
        self.waited, self.wire_bytes = self.exchange.waited, self.exchange.wire_bytes
    elif is_stock_exchange(self):
        synchronize_stock_exchange(self)
    self._synchronized = True


def reduce_and_step(self: Any, closure: Callable[[], float] | None = None) -> float | None:
    """Reduce the gradients, unless that was done, and step."""
    if closure is not None and self.process_set.size() > 1:
        raise ValueError("step(closure) would evaluate gradients that are not reduced; call backward() before step()")
    self.synchronize()
    self._synchronized = False
    self._opt_called = True  # torch's schedulers look whether it was
    step, without_grad = self.inner_step
    with torch.no_grad() if without_grad else contextlib.nullcontext():
        return step(self) if closure is None else step(self, closure)  # type: ignore[no-any-return]


reduce_and_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # so that they do not wrap it themselves


def zero_grad(self: Any, set_to_none: bool = True) -> None:
    """Zero gradients as torch does; the next step gets nothing of them, also of those that are being reduced.

    All ranks call it alike: if gradients can have been sent, it waits for the other ranks.

    Raises:
        RuntimeError: they are being reduced by Horovod's own exchange.
        RunError: other ranks use, in `step`, gradients that this one drops.
    """
    if self._handles:
        raise RuntimeError("zero_grad() between backward() and step(): the gradients are being reduced")
    if isinstance(self.exchange, BucketedExchange):
        self.exchange.discard_gradients(unused_sums=self._synchronized)
    elif self.exchange is not None:
        self.exchange.discard_gradients()
    self._synchronized = False
    super(self.__class__, self).zero_grad(set_to_none)


def pause_exchange(self: Any) -> contextlib.AbstractContextManager[None]:
    """Let backward passes within this be for other optimizers, as when a generator learns from a discriminator.

    What they add to the gradients of this optimizer's parameters is not exchanged; zero_grad() drops it.
    """
    reject_stock_exchange(self, "paused()")
    return self.exchange.paused() if isinstance(self.exchange, BucketedExchange) else contextlib.nullcontext()


def add_param_group(self: Any, group: ParamGroup) -> None:
    """Add a group as torch does; on all ranks, with the same values, before the parameters' first gradients."""
    super(self.__class__, self).add_param_group(group)
    number = len(self.param_groups) - 1
    added = self.param_groups[number]
    names = added.get("param_names", [f"group{number}.{place}" for place in range(len(added["params"]))])
    reject_stock_exchange(self, "add_param_group() of a wrapped optimizer")
    for name, p in zip(names, added["params"], strict=True):
        if name in self._parameter_names.values() and p not in self._parameter_names:
            raise ValueError(f"another parameter is named {name}: give other names in the group's 'params'")
        name = self._parameter_names.setdefault(p, name)
        if self.exchange is not None:
            self.exchange.add_parameter(name, p)


def load_state_dict(self: Any, state_dict: StateDict) -> None:
    load_in_place(self, lambda: self.stock_load_state_dict(state_dict))


def get_param_groups(self: Any) -> list[ParamGroup]:
    if self.exchange is not None and self.exchange.has_pending_gradients:
        self.synchronize()
    return read_param_groups(self)


def read_param_groups(self: Any) -> list[ParamGroup]:
    """Return the groups of a wrapped optimizer, without waiting for gradients; of another one as they are."""
    if not hasattr(type(self), "inner_class"):
        return self.param_groups  # type: ignore[no-any-return]
    declared = inspect.getattr_static(self.inner_class, "param_groups", None)
    if declared is not None:  # a property, of an optimizer around another
        return declared.__get__(self)  # type: ignore[no-any-return]
    return self.__dict__["param_groups"]  # type: ignore[no-any-return]


def set_param_groups(self: Any, groups: list[ParamGroup]) -> None:
    declared = inspect.getattr_static(self.inner_class, "param_groups", None)
    if declared is not None:
        declared.__set__(self, groups)
    else:
        # In the instance's dict, where torch's load_state_dict and pickling look for it.
        self.__dict__["param_groups"] = groups


def build_class_body(inner_class: type, inner_step: Any) -> dict[str, object]:
    """Return the attributes of a class that is Horovod's DistributedOptimizer with these methods in it.

    Args:
        inner_class: the optimizer's own class.
        inner_step: `find_inner_step` of the optimizer.
    """
    body = dict(hvd.DISTRIBUTED_OPTIMIZER_BODY)
    return body | {
        "inner_class": inner_class,
        "inner_step": inner_step,
        "exchange": None,
        "waited": 0.0,
        "wire_bytes": 0,
        "stock_synchronize": body["synchronize"],
        "stock_load_state_dict": body["load_state_dict"],
        "synchronize": synchronize,
        "step": reduce_and_step,
        "zero_grad": zero_grad,
        "paused": pause_exchange,
        "add_param_group": add_param_group,
        "load_state_dict": load_state_dict,
        "param_groups": property(get_param_groups, set_param_groups),
    }
