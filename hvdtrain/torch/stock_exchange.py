"""`exchange="horovod"`: the gradients' exchange left to Horovod's own DistributedOptimizer, for comparison.

`hvdtrain bench step` measures it. It takes contiguous parameters and no compression but fp16, and neither parameters
that are added or trained later nor `paused()`.
"""

from __future__ import annotations

import time
from typing import Any

from hvdtrain.comm import collectives
from hvdtrain.comm import horovod as hvd
from hvdtrain.exchange.partition import NamedParameters
from hvdtrain.system.errors import UserError

STOCK_COMPRESSION = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}


def check_stock_exchange(compression: str, named: NamedParameters) -> None:
    """Raise UserError for what Horovod's own exchange cannot do."""
    if compression not in STOCK_COMPRESSION:
        raise UserError(f"compression {compression!r} needs the bucketed exchange; Horovod's own takes none or fp16")
    for name, p in named:
        if not p.is_contiguous() or p.is_complex():
            kind = "complex" if p.is_complex() else "channels-last"
            raise UserError(f"Horovod's own exchange takes no {kind} parameter, as {name} is; use bucketed")


def is_stock_exchange(optimizer: Any) -> bool:
    """Return whether Horovod's own hooks are in place: not with buckets, and not on one rank."""
    return optimizer.exchange is None and bool(optimizer._requires_update)


def reject_stock_exchange(optimizer: Any, what: str) -> None:
    """Raise UserError if Horovod's own exchange is in use, which cannot do that."""
    if is_stock_exchange(optimizer):
        raise UserError(f"{what} needs the bucketed exchange")


def synchronize_stock_exchange(optimizer: Any) -> None:
    """Wait for Horovod's all-reduces; set `waited` and `wire_bytes`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p not in optimizer._requires_update:
                name = optimizer._parameter_names[p]
                raise UserError(
                    f"{name} did not require a gradient at first: Horovod's own exchange leaves it out; use bucketed"
                )
    begin = time.perf_counter()
    optimizer.stock_synchronize()
    optimizer.waited = time.perf_counter() - begin
    halved = 2 if optimizer._compression is hvd.Compression.fp16 else 1
    payload = sum(p.numel() * p.element_size() for p in optimizer._requires_update) // halved
    optimizer.wire_bytes = collectives.ring_all_reduce_bytes(payload, collectives.size(optimizer.process_set))
