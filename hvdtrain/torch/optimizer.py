"""Horovod's DistributedOptimizer with hvdtrain's exchange in it, right also where Horovod's own is not."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import horovod.torch as hvd
import torch
from horovod.torch import optimizer as horovod_optimizer

from hvdtrain.collectives import ops
from hvdtrain.collectives.agreement import agree
from hvdtrain.compression.spec import parse
from hvdtrain.errors import UserError
from hvdtrain.torch.buckets import Named
from hvdtrain.torch.exchange import Exchange
from hvdtrain.torch.fingerprint import model_parts
from hvdtrain.torch.shards import ShardExchange


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    average: bool = True,
    backward_passes_per_step: int = 1,
    compression: str = "none",
    exchange: Literal["bucketed", "horovod"] = "bucketed",
    seed: int = 0,
    process_set: hvd.ProcessSet | None = None,
    bucket_bytes: int | None = None,
    shards: int | None = None,
) -> torch.optim.Optimizer:
    """Wrap an optimizer so that `step()` applies the mean (or, with average=False, the sum) of all ranks' gradients.

    It is Horovod's own DistributedOptimizer, a subclass of the optimizer's class, with the exchange replaced by flat
    buckets (`hvdtrain.torch.exchange`). Beyond Horovod's:

    - `zero_grad(set_to_none=...)`, and parameters in any memory format and floating type;
    - `synchronize()` before `step()` (to clip, say) needs no `skip_synchronize()`;
    - `GradScaler.unscale_(optimizer)` waits for the gradients by itself: whoever reads `param_groups` does;
    - a parameter that no rank used keeps `grad` None;
    - hooks of `step()` run once per step;
    - state and defaults of the optimizer that is wrapped are kept.

    compression: a specification (`hvdtrain.compression.spec`); seed: of its randomness, the same on all ranks.
    process_set: the ranks that train this model together; None: all. bucket_bytes: about as much is sent at once; None:
    8 MiB on CPUs, 25 MiB on GPUs.
    exchange: "horovod" leaves the exchange to Horovod, for comparison; compression is then none or fp16.
    shards: sum over so many virtual shards of the batch, the same bits on any number of ranks; only with average=False,
    and the caller says through `exchange.begin` and `exchange.passed` what belongs to which (`hvdtrain.torch.shards`).
    Clip after `synchronize()`: torch.nn.utils.clip_grad_norm_(model.parameters(), ...) does not go through it.
    Raises ValueError where a parameter of the optimizer has no name, a name stands twice or a parameter is in another
    DistributedOptimizer whose `exchange` was not closed; UserError for a wrong compression.
    """
    named_parameters = list(named_parameters)
    spec = parse(compression)
    stock = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}
    if exchange == "horovod" and compression not in stock:
        raise UserError(f"compression {compression!r} needs the bucketed exchange; Horovod's own takes none or fp16")
    if shards is not None and (average or exchange == "horovod" or compression != "none"):
        raise ValueError("shards goes with average=False, the bucketed exchange and no compression")
    if exchange == "horovod":
        for name, p in named_parameters:
            if not p.is_contiguous():
                raise UserError(f"Horovod's own exchange takes no channels-last parameter, as {name} is; use bucketed")
    body = dict(horovod_optimizer._DistributedOptimizer.__dict__)
    body |= {
        "exchange": None,
        "inner_step": _inner_step(optimizer),
        "waited": 0.0,
        "wire_bytes": 0,
        "stock_synchronize": body["synchronize"],
        "synchronize": _synchronize,
        "step": _step,
        "zero_grad": _zero_grad,
        "param_groups": property(_get_param_groups, _set_param_groups),
    }

    def make_exchange(_: Any, named: Named) -> Exchange | ShardExchange:
        if shards is not None:
            return ShardExchange(named, shards, process_set)
        return Exchange(named, average, spec, seed, process_set, bucket_bytes)

    if exchange == "bucketed":
        body |= {
            "_register_hooks": _register_hooks,
            "set_backward_passes_per_step": _set_passes,
            "_make_exchange": make_exchange,
        }
    # Keeping the class's name and module lets schedulers, checkpoints and Horovod's own helpers recognize it.
    cls = type(optimizer.__class__.__name__, (optimizer.__class__,), body)
    wrapped: Any = cls(
        optimizer.param_groups,
        named_parameters,
        hvd.Compression.none if exchange == "bucketed" else stock[compression],
        backward_passes_per_step,
        hvd.Average if average else hvd.Sum,
        sparse_as_dense=True,
        process_set=process_set or hvd.global_process_set,
    )
    if shards is not None and wrapped.exchange is None:
        wrapped._register_hooks()  # which Horovod's constructor leaves out on one rank
    wrapped.state = optimizer.state
    wrapped.defaults = optimizer.defaults
    return wrapped  # type: ignore[no-any-return]


def _register_hooks(self: Any) -> None:
    """Called by Horovod's constructor where there is more than one rank."""
    # _parameter_names is sorted by name; the optimizer's own order is the model's, and so backward's reversed.
    params = [p for group in self.param_groups for p in group["params"]]
    self.exchange = self._make_exchange([(self._parameter_names[p], p) for p in params])
    self.exchange.set_passes(self.backward_passes_per_step)


def _set_passes(self: Any, passes: int) -> None:
    """How many backward passes this rank makes before the next step: ranks may differ, and 0 is allowed."""
    self.backward_passes_per_step = passes
    if self.exchange is not None:
        self.exchange.set_passes(passes)


def _synchronize(self: Any) -> None:
    """Wait until the gradients are reduced; once per step, on all ranks. Nothing to do if it was done."""
    if self._synchronized:
        return
    if self.exchange is not None:
        self.exchange.finish()
        self.waited, self.wire_bytes = self.exchange.waited, self.exchange.wire_bytes
    elif self._requires_update:  # Horovod's own hooks are in place
        begin = time.perf_counter()
        self.stock_synchronize()
        self.waited = time.perf_counter() - begin
        halved = 2 if self._compression is hvd.Compression.fp16 else 1
        payload = sum(p.numel() * p.element_size() for p in self._requires_update) // halved
        self.wire_bytes = ops.ring_bytes(payload, ops.size(self.process_set))
    self._synchronized = True


def _step(self: Any, closure: Callable[[], float] | None = None) -> float | None:
    """Reduce the gradients, unless that was done, and step."""
    if closure is not None and self.process_set.size() > 1:
        raise ValueError("step(closure) would evaluate gradients that are not reduced; call backward() before step()")
    self.synchronize()
    self._synchronized = False
    step, without_grad = self.inner_step
    with torch.no_grad() if without_grad else contextlib.nullcontext():
        return step(self, closure)  # type: ignore[no-any-return]


def _inner_step(optimizer: torch.optim.Optimizer) -> tuple[Callable[..., Any], bool]:
    """The step of the optimizer's class without what torch wraps around it, and whether that turns gradients off.

    Ours is wrapped already: its hooks would run twice. And the other wrapper imports torch's compiler, which takes as
    long as half of what a rank needs to start.
    """
    step: Any = type(optimizer).step
    without_grad = False
    while hasattr(step, "__wrapped__") and step.__globals__["__name__"] == torch.optim.Optimizer.__module__:
        without_grad |= step.__code__.co_name == "_use_grad" and not optimizer.defaults["differentiable"]
        step = step.__wrapped__
    return step, without_grad


def _zero_grad(self: Any, set_to_none: bool = True) -> None:
    """As torch's. Raises RuntimeError while an exchange is in flight, which would be reduced into the next step."""
    if self._handles or (self.exchange is not None and self.exchange.pending):
        raise RuntimeError("zero_grad() between backward() and step(): the gradients are being reduced")
    self._synchronized = False
    super(self.__class__, self).zero_grad(set_to_none)


def _get_param_groups(self: Any) -> list[dict[str, Any]]:
    if self.exchange is not None and self.exchange.pending:
        self.synchronize()
    return self.__dict__["param_groups"]  # type: ignore[no-any-return]


def _set_param_groups(self: Any, groups: list[dict[str, Any]]) -> None:
    # In the instance's dict, where torch's load_state_dict and pickling look for it.
    self.__dict__["param_groups"] = groups


def broadcast_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    root: int = 0,
    process_set: hvd.ProcessSet | None = None,
) -> None:
    """Overwrite parameters, buffers and optimizer state with the root's, in any memory format.

    root: a rank among all, also where a process_set is given; it must be in it.
    Raises UserError on all ranks, naming the first difference, if the models' parameters or buffers differ in name,
    order, shape or dtype.
    """
    if ops.size(process_set) == 1:
        return
    agree("state.agreement", model_parts(model), process_set)
    tensors = [*model.parameters(), *model.buffers()]
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        part = [t.detach() for t in tensors if t.dtype == dtype]
        # As bytes: Horovod knows neither bfloat16 nor bool everywhere.
        flat = torch.cat([t.reshape(-1) for t in part]).view(torch.uint8)
        ops.broadcast_(flat, f"state.{dtype}", root, process_set)
        for t, piece in zip(part, torch.split(flat.view(dtype), [t.numel() for t in part]), strict=True):
            t.copy_(piece.view(t.shape))
    if optimizer is not None:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        data = ops.broadcast_bytes(buffer.getvalue(), "state.optimizer", root, process_set)
        optimizer.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
