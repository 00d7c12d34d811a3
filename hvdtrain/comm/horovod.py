"""The parts of Horovod that other rooms extend or ask: only `comm/` imports Horovod, the others import this.

`DistributedOptimizer` of `hvdtrain.torch` is Horovod's own class with another exchange, so it needs that class as it is
(`DISTRIBUTED_OPTIMIZER_BODY`). Everything that only communicates goes through `hvdtrain.comm.collectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
from horovod.torch import optimizer as horovod_optimizer

from hvdtrain.comm.world import World, init

Average, Compression, Sum = hvd.Average, hvd.Compression, hvd.Sum
local_rank, local_size = hvd.local_rank, hvd.local_size
# Attributes and methods of the class that Horovod mixes into an optimizer's own.
DISTRIBUTED_OPTIMIZER_BODY: dict[str, Any] = dict(horovod_optimizer._DistributedOptimizer.__dict__)  # a namespace


def all_ranks() -> Any:
    """Return Horovod's process set of all ranks, which exists once Horovod is initialized."""
    return hvd.global_process_set


def init_process_sets(groups: Sequence[Sequence[int]]) -> tuple[World, list[Any]]:
    """Initialize Horovod with process sets of these ranks.

    Args:
        groups: the ranks of each process set, the same on every rank.

    Returns:
        this process's place, and the process sets in the same order.
    """
    process_sets = [hvd.ProcessSet(list(ranks)) for ranks in groups]
    hvd.init(process_sets=process_sets)
    return init(), process_sets


def transport_name(device_type: str) -> str:
    """Return what carries the collectives of tensors on "cpu" or "cuda": nccl, mpi or gloo."""
    if device_type == "cuda" and hvd.nccl_built():
        return "nccl"
    return "mpi" if hvd.mpi_enabled() else "gloo"
