"""hvdtrain for torch: the Recipe to subclass, what its `score` may call, and a DistributedOptimizer for own loops."""

from hvdtrain.recipe.options import option
from hvdtrain.torch.broadcast import broadcast_state
from hvdtrain.torch.optimizer import DistributedOptimizer
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.score_collectives import all_gather, all_reduce, own_rows
from hvdtrain.torch.sync_batch_norm import SyncBatchNorm

__all__ = [
    "DistributedOptimizer",
    "Recipe",
    "SyncBatchNorm",
    "all_gather",
    "all_reduce",
    "broadcast_state",
    "option",
    "own_rows",
]
