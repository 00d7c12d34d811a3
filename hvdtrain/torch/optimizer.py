"""Horovod's DistributedOptimizer with hvdtrain's exchange in it, correct also in cases in which Horovod's own is not.

It is Horovod's own class, a subclass of the optimizer's class, with the exchange replaced by flat buckets
(`hvdtrain.exchange.bucketed`). Beyond Horovod's:

- `zero_grad(set_to_none=...)`, and parameters in any memory format and floating type;
- `synchronize()` before `step()` (to clip, say) needs no `skip_synchronize()`;
- `GradScaler.unscale_(optimizer)` waits for the gradients by itself: whoever reads `param_groups` does;
- a parameter that no rank used keeps `grad` None;
- hooks of `step()` run once per step;
- the optimizer itself is returned, whatever its constructor takes, with its class changed: attributes, hooks, state and
  schedulers stay, and an optimizer around another stays around it;
- parameters may be frozen and trained in turns, and `add_param_group` adds others, on all ranks alike;
- `paused()` for backward passes that are for another optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm import horovod as hvd
from hvdtrain.compression.hierarchical_reducer import RoundOrder
from hvdtrain.compression.spec import parse_compression
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.buckets import ExchangeConfig
from hvdtrain.exchange.parameter_checks import check_parameters
from hvdtrain.exchange.partition import NamedParameters
from hvdtrain.exchange.sharded import ShardedExchange
from hvdtrain.torch.optimizer_methods import build_class_body, register_hooks, set_backward_passes
from hvdtrain.torch.readable import make_savable
from hvdtrain.torch.stock_exchange import STOCK_COMPRESSION, check_stock_exchange
from hvdtrain.torch.torch_wrappers import find_inner_step


@dataclass(frozen=True)
class WrapOptions:
    """How an optimizer is wrapped: the keywords of `DistributedOptimizer`."""

    config: ExchangeConfig
    kind: Literal["bucketed", "horovod"]
    backward_passes: int
    shards: int | None
    left_out: Collection[torch.nn.Parameter] = ()

    def make_exchange(self, named: NamedParameters) -> BucketedExchange | ShardedExchange:
        """Make hvdtrain's exchange."""
        named = [(name, p) for name, p in named if p not in self.left_out]
        if self.shards is not None:
            return ShardedExchange(named, self.shards, self.config.group, self.config.name)
        return BucketedExchange(named, self.config)


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
    name: str = "",
    round_order: RoundOrder | None = None,
    left_out: Collection[torch.nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Wrap an optimizer so that `step()` applies the mean (or the sum) of all ranks' gradients.

    Clip after `synchronize()`: torch.nn.utils.clip_grad_norm_(model.parameters(), ...) does not wait for gradients.

    Args:
        optimizer: it is changed and returned.
        named_parameters: the model's, by names that are the same on all ranks; all of the optimizer's are among them.
        average: whether the gradients are averaged; else summed.
        backward_passes_per_step: backward passes whose gradients are accumulated before they are exchanged.
        compression: a specification (`hvdtrain.compression.spec`).
        exchange: "horovod" leaves the exchange to Horovod, for comparison; compression is then none or fp16.
        seed: of compression's randomness, the same on all ranks.
        process_set: the ranks that train this model together; None: all.
        bucket_bytes: about as much is sent at once; None: 8 MiB on CPUs, 25 MiB on GPUs.
        shards: sum over so many virtual shards of the batch, the same bits on any number of ranks. Only with
            average=False, and the caller announces through `exchange.start_exchange` and `exchange.end_backward_pass`
            what belongs to which (`hvdtrain.exchange.sharded`).
        name: before those of its collectives, if gradients of several optimizers are exchanged at the same time.
        round_order: over hosts, each of which encodes the sum of its ranks.
        left_out: a set of parameters whose gradients are not exchanged, as the caller does that.

    Raises:
        ValueError: a parameter of the optimizer has no name, two have the same, or one is in another
            DistributedOptimizer whose `exchange` was not closed.
        UserError: the compression is not valid, or a parameter cannot be exchanged.
    """
    if shards is not None and (average or exchange == "horovod" or compression != "none"):
        raise ValueError("shards needs average=False, the bucketed exchange and no compression")
    named = list(named_parameters)
    if hasattr(type(optimizer), "inner_class"):
        unwrap_optimizer(optimizer)
    check_all_named(optimizer, named)
    make_savable(optimizer)
    spec = parse_compression(compression)
    if exchange == "horovod":
        check_stock_exchange(compression, named)
    config = ExchangeConfig(average=average, spec=spec, seed=seed, name=name, bucket_bytes=bucket_bytes)
    config = replace(config, group=process_set, round_order=round_order)
    _wrap_optimizer(optimizer, named, WrapOptions(config, exchange, backward_passes_per_step, shards, left_out))
    return optimizer


def _wrap_optimizer(optimizer: torch.optim.Optimizer, named: NamedParameters, options: WrapOptions) -> None:
    """Make the optimizer's class Horovod's DistributedOptimizer, with hvdtrain's exchange unless it is "horovod"."""
    config = options.config
    held = {p for group in optimizer.param_groups for p in group["params"]}
    check_parameters([(name, p) for name, p in named if p in held], config.spec)
    inner_class = type(optimizer)
    body = build_class_body(inner_class, find_inner_step(optimizer))
    if options.kind == "bucketed":
        body |= {
            "_register_hooks": register_hooks,
            "set_backward_passes_per_step": set_backward_passes,
            "_make_exchange": lambda self, named: options.make_exchange(named),
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
            named,
            hvd.Compression.none if options.kind == "bucketed" else STOCK_COMPRESSION[config.spec.text],
            options.backward_passes,
            hvd.Average if config.average else hvd.Sum,
            sparse_as_dense=True,
            process_set=hvd.all_ranks() if config.group in (None, collectives.COLUMN) else config.group,
        )
        # What torch's constructor does, and an optimizer around another may not have called.
        torch.optim.Optimizer.__setstate__(wrapped, {})
        if options.shards is not None and wrapped.exchange is None:
            wrapped._register_hooks()  # which Horovod's constructor leaves out on one rank
    except BaseException:
        vars(wrapped)["wrapped_attributes"] = set(vars(wrapped)) - before
        unwrap_optimizer(wrapped)
        raise
    vars(wrapped)["wrapped_attributes"] = set(vars(wrapped)) - before


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
