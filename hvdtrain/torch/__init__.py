"""hvdtrain for torch: the Recipe to subclass, and a DistributedOptimizer that also serves in a loop of your own."""

from hvdtrain.recipe.options import option
from hvdtrain.torch.broadcast import broadcast_state
from hvdtrain.torch.optimizer import DistributedOptimizer
from hvdtrain.torch.recipe import Recipe

__all__ = ["DistributedOptimizer", "Recipe", "broadcast_state", "option"]
