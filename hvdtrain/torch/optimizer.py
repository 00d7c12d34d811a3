"""Horovod's DistributedOptimizer with hvdtrain's exchange in it, right also where Horovod's own is not."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm import horovod as hvd
from hvdtrain.compression.spec import parse_compression
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.buckets import ExchangeConfig, NamedParameters, check_parameters
from hvdtrain.exchange.sharded import ShardedExchange
from hvdtrain.system.errors import UserError
from hvdtrain.torch.broadcast import load_in_place
from hvdtrain.torch.readable import make_savable


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    average: bool = True,
    backward_passes_per_step: int = 1,
    compression: str = "none",
    exchange: Literal["bucketed", "horovod"] = "bucketed",
    seed: int = 0,
    process_set: collectives.Group = None,
    bucket_bytes: int | None = None,
    shards: int | None = None,
) -> torch.optim.Optimizer:
    """Wrap an optimizer so that `step()` applies the mean (or, with average=False, the sum) of all ranks' gradients.

    It is Horovod's own DistributedOptimizer, a subclass of the optimizer's class, with the exchange replaced by flat
    buckets (`hvdtrain.exchange.bucketed`). Beyond Horovod's:

    - `zero_grad(set_to_none=...)`, and parameters in any memory format and floating type;
    - `synchronize()` before `step()` (to clip, say) needs no `skip_synchronize()`;
    - `GradScaler.unscale_(optimizer)` waits for the gradients by itself: whoever reads `param_groups` does;
    - a parameter that no rank used keeps `grad` None;
    - hooks of `step()` run once per step;
    - the optimizer itself is returned, whatever its constructor takes, with its class changed: attributes, hooks, state
      and schedulers stay, and an optimizer around another stays around it;
    - parameters may be frozen and trained in turns, and `add_param_group` adds others, on all ranks alike;
    - `paused()` for backward passes that are for another optimizer.

    compression: a specification (`hvdtrain.compression.spec`); seed: of its randomness, the same on all ranks.
    process_set: the ranks that train this model together; None: all. bucket_bytes: about as much is sent at once; None:
    8 MiB on CPUs, 25 MiB on GPUs.
    exchange: "horovod" leaves the exchange to Horovod, for comparison; compression is then none or fp16.
    shards: sum over so many virtual shards of the batch, the same bits on any number of ranks; only with average=False,
    and the caller says through `exchange.start_exchange` and `exchange.end_backward_pass` what belongs to which
    (`hvdtrain.exchange.sharded`).
    Clip after `synchronize()`: torch.nn.utils.clip_grad_norm_(model.parameters(), ...) does not go through it.
    Raises ValueError where a parameter of the optimizer has no name, a name stands twice or a parameter is in another
    DistributedOptimizer whose `exchange` was not closed; UserError for a wrong compression.
    """
    if hasattr(type(optimizer), "inner_class"):
        unwrap_optimizer(optimizer)
    named_parameters = list(named_parameters)
    check_all_named(optimizer, named_parameters)
    make_savable(optimizer)
    spec = parse_compression(compression)
    stock = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}
    if exchange == "horovod" and compression not in stock:
        raise UserError(f"compression {compression!r} needs the bucketed exchange; Horovod's own takes none or fp16")
    if shards is not None and (average or exchange == "horovod" or compression != "none"):
        raise ValueError("shards goes with average=False, the bucketed exchange and no compression")
    if exchange == "horovod":
        for name, p in named_parameters:
            if not p.is_contiguous() or p.is_complex():
                kind = "complex" if p.is_complex() else "channels-last"
                raise UserError(f"Horovod's own exchange takes no {kind} parameter, as {name} is; use bucketed")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    check_parameters([(name, p) for name, p in named_parameters if p in held], spec)
    inner_class = type(optimizer)
    body = dict(hvd.DISTRIBUTED_OPTIMIZER_BODY)
    body |= {
        "inner_class": inner_class,
        "inner_step": _find_inner_step(optimizer),
        "exchange": None,
        "waited": 0.0,
        "wire_bytes": 0,
        "stock_synchronize": body["synchronize"],
        "stock_load_state_dict": body["load_state_dict"],
        "synchronize": _synchronize,
        "step": _reduce_and_step,
        "zero_grad": _zero_grad,
        "paused": _pause_exchange,
        "add_param_group": _add_param_group,
        "load_state_dict": _load_state_dict,
        "param_groups": property(_get_param_groups, _set_param_groups),
    }

    def make_exchange(_: Any, named: NamedParameters) -> BucketedExchange | ShardedExchange:
        if shards is not None:
            return ShardedExchange(named, shards, process_set)
        config = ExchangeConfig(average=average, spec=spec, seed=seed, group=process_set, bucket_bytes=bucket_bytes)
        return BucketedExchange(named, config)

    if exchange == "bucketed":
        body |= {
            "_register_hooks": _register_hooks,
            "set_backward_passes_per_step": _set_backward_passes,
            "_make_exchange": make_exchange,
        }
    wrapped: Any = optimizer
    # A scheduler's, or another's: it would be called instead of ours.
    vars(wrapped)["wrapped_step"] = vars(wrapped).pop("step", None)
    before = set(vars(wrapped))
    # Keeping the class's name and module lets schedulers, checkpoints and Horovod's own helpers recognize it.
    # The class between keeps Horovod's constructor from calling the optimizer's again: the object is made already.
    made = type(inner_class.__name__, (inner_class,), {"__init__": lambda self, params: None})
    wrapped.__class__ = type(inner_class.__name__, (made,), body)
    try:
        wrapped.__init__(
            optimizer.param_groups,
            named_parameters,
            hvd.Compression.none if exchange == "bucketed" else stock[compression],
            backward_passes_per_step,
            hvd.Average if average else hvd.Sum,
            sparse_as_dense=True,
            process_set=process_set or hvd.all_ranks(),
        )
        # What torch's constructor does, and an optimizer around another may not have called.
        torch.optim.Optimizer.__setstate__(wrapped, {})
        if shards is not None and wrapped.exchange is None:
            wrapped._register_hooks()  # which Horovod's constructor leaves out on one rank
    except BaseException:
        vars(wrapped)["wrapped_attributes"] = set(vars(wrapped)) - before
        unwrap_optimizer(wrapped)
        raise
    vars(wrapped)["wrapped_attributes"] = set(vars(wrapped)) - before
    return optimizer


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Undo `DistributedOptimizer`: the object is one of its own class again, and its parameters are free."""
    wrapped: Any = optimizer
    if isinstance(wrapped.exchange, BucketedExchange):
        wrapped.exchange.close()
    vars(wrapped).get("_grad_accs", []).clear()  # with which Horovod's own hooks go
    for name in vars(wrapped).pop("wrapped_attributes", ()):
        vars(wrapped).pop(name, None)
    wrapped.__class__ = type(wrapped).inner_class
    if (step := vars(wrapped).pop("wrapped_step", None)) is not None:
        wrapped.step = step


def check_all_named(optimizer: torch.optim.Optimizer, named: NamedParameters) -> None:
    """Raise ValueError if a parameter of the optimizer has no name."""
    known = {p for _, p in named}
    for number, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            if p not in known:
                raise ValueError(
                    f"parameter {place} of the optimizer's group {number}, of shape {tuple(p.shape)}, is not among "
                    "named_parameters: add it, for instance by putting it into the model"
                )


def _register_hooks(self: Any) -> None:
    """Called by Horovod's constructor where there is more than one rank."""
    # _parameter_names is sorted by name; the optimizer's own order is the model's, and so backward's reversed.
    params = [p for group in self.param_groups for p in group["params"]]
    self.exchange = self._make_exchange([(self._parameter_names[p], p) for p in params])
    _set_backward_passes(self, self.backward_passes_per_step)


def _set_backward_passes(self: Any, passes: int) -> None:
    """How many backward passes this rank makes before the next step: ranks may differ, and 0 is allowed."""
    self.backward_passes_per_step = passes
    if isinstance(self.exchange, BucketedExchange):  # others are told by the caller what a pass belongs to
        self.exchange.set_passes(passes)


def _synchronize(self: Any) -> None:
    """Wait until the gradients are reduced; once per step, on all ranks. Nothing to do if it was done."""
    if self._synchronized:
        return
    if self.exchange is not None:
        self.exchange.finish_exchange()
        self.waited, self.wire_bytes = self.exchange.waited, self.exchange.wire_bytes
    elif self._requires_update:  # Horovod's own hooks are in place
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self._requires_update:
                    name = self._parameter_names[p]
                    raise UserError(
                        f"{name} is trained since later: Horovod's own exchange leaves it out; use bucketed"
                    )
        begin = time.perf_counter()
        self.stock_synchronize()
        self.waited = time.perf_counter() - begin
        halved = 2 if self._compression is hvd.Compression.fp16 else 1
        payload = sum(p.numel() * p.element_size() for p in self._requires_update) // halved
        self.wire_bytes = collectives.ring_all_reduce_bytes(payload, collectives.size(self.process_set))
    self._synchronized = True


def _reduce_and_step(self: Any, closure: Callable[[], float] | None = None) -> float | None:
    """Reduce the gradients, unless that was done, and step."""
    if closure is not None and self.process_set.size() > 1:
        raise ValueError("step(closure) would evaluate gradients that are not reduced; call backward() before step()")
    self.synchronize()
    self._synchronized = False
    self._opt_called = True  # torch's schedulers look whether it was
    step, without_grad = self.inner_step
    with torch.no_grad() if without_grad else contextlib.nullcontext():
        return step(self) if closure is None else step(self, closure)  # type: ignore[no-any-return]


_reduce_and_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # so that they do not wrap it themselves


def _find_inner_step(optimizer: torch.optim.Optimizer) -> tuple[Callable[..., Any], bool]:
    """The optimizer's step without what torch wraps around it, and whether that turns gradients off.

    Ours is wrapped already: its hooks would run twice. And the other wrapper imports torch's compiler, which takes as
    long as half of what a rank needs to start.
    """
    own = vars(optimizer).get("step")
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return (lambda _, *closure: own(*closure)), False
    step: Any = type(optimizer).step
    without_grad = False
    while hasattr(step, "__wrapped__") and step.__globals__["__name__"] == torch.optim.Optimizer.__module__:
        without_grad |= step.__code__.co_name == "_use_grad" and not optimizer.defaults["differentiable"]
        step = step.__wrapped__
    return step, without_grad


def _zero_grad(self: Any, set_to_none: bool = True) -> None:
    """As torch's. Raises RuntimeError while an exchange is in flight, which would be reduced into the next step."""
    if self._handles:
        raise RuntimeError("zero_grad() between backward() and step(): the gradients are being reduced")
    if self.exchange is not None:
        self.exchange.discard_gradients()
    self._synchronized = False
    super(self.__class__, self).zero_grad(set_to_none)


def _pause_exchange(self: Any) -> contextlib.AbstractContextManager[None]:
    """Let backward passes within this be for other optimizers, as where a generator learns from a discriminator.

    What they add to the gradients of this optimizer's parameters is not exchanged; zero_grad() drops it.
    """
    if self.exchange is None and self._requires_update:
        raise UserError("paused() needs the bucketed exchange")
    return self.exchange.paused() if isinstance(self.exchange, BucketedExchange) else contextlib.nullcontext()


def _add_param_group(self: Any, group: dict[str, Any]) -> None:
    """As torch's; on all ranks, with the same values, before the parameters' first gradients."""
    super(self.__class__, self).add_param_group(group)
    number = len(self.param_groups) - 1
    added = self.param_groups[number]
    names = added.get("param_names", [f"group{number}.{place}" for place in range(len(added["params"]))])
    if self.exchange is None and self._requires_update:
        raise UserError("add_param_group() needs the bucketed exchange once the optimizer is wrapped")
    for name, p in zip(names, added["params"], strict=True):
        if name in self._parameter_names.values() and p not in self._parameter_names:
            raise ValueError(f"another parameter is named {name}: give other names in the group's 'params'")
        name = self._parameter_names.setdefault(p, name)
        if self.exchange is not None:
            self.exchange.add_parameter(name, p)


def _load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    load_in_place(self, lambda: self.stock_load_state_dict(state_dict))


def _get_param_groups(self: Any) -> list[dict[str, Any]]:
    if self.exchange is not None and self.exchange.has_pending_gradients:
        self.synchronize()
    declared = inspect.getattr_static(self.inner_class, "param_groups", None)
    if declared is not None:  # a property, of an optimizer around another
        return declared.__get__(self)  # type: ignore[no-any-return]
    return self.__dict__["param_groups"]  # type: ignore[no-any-return]


def _set_param_groups(self: Any, groups: list[dict[str, Any]]) -> None:
    declared = inspect.getattr_static(self.inner_class, "param_groups", None)
    if declared is not None:
        declared.__set__(self, groups)
    else:
        # In the instance's dict, where torch's load_state_dict and pickling look for it.
        self.__dict__["param_groups"] = groups
