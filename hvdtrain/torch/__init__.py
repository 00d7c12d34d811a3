"""hvdtrain for torch: the Recipe to subclass, what its `score` may call, and a DistributedOptimizer for own loops.

Without Horovod: `ddp_hook`, for torch's DistributedDataParallel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdtrain.system.lazy_names import make_lazy_getattr

if TYPE_CHECKING:
    from hvdtrain.recipe.options import option
    from hvdtrain.torch.broadcast import broadcast_state
    from hvdtrain.torch.communication_hook import ddp_hook
    from hvdtrain.torch.optimizer import DistributedOptimizer
    from hvdtrain.torch.recipe import Recipe
    from hvdtrain.torch.score_collectives import all_gather, all_reduce, own_rows
    from hvdtrain.torch.sync_batch_norm import SyncBatchNorm
    from hvdtrain.torch.table_lookup import lookup

__all__ = [
    "DistributedOptimizer",
    "Recipe",
    "SyncBatchNorm",
    "all_gather",
    "all_reduce",
    "broadcast_state",
    "ddp_hook",
    "lookup",
    "option",
    "own_rows",
]

_MODULES = {
    "DistributedOptimizer": "hvdtrain.torch.optimizer",
    "Recipe": "hvdtrain.torch.recipe",
    "SyncBatchNorm": "hvdtrain.torch.sync_batch_norm",
    "all_gather": "hvdtrain.torch.score_collectives",
    "all_reduce": "hvdtrain.torch.score_collectives",
    "broadcast_state": "hvdtrain.torch.broadcast",
    "ddp_hook": "hvdtrain.torch.communication_hook",
    "lookup": "hvdtrain.torch.table_lookup",
    "option": "hvdtrain.recipe.options",
    "own_rows": "hvdtrain.torch.score_collectives",
}


# Lazily: `ddp_hook` must not import Horovod.
__getattr__ = make_lazy_getattr(__name__, _MODULES)
