"""hvdtrain for JAX: the Recipe to subclass, and the exchange of gradients for loops of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdtrain.system.lazy_names import make_lazy_getattr

if TYPE_CHECKING:
    from hvdtrain.comm.collectives import rank, size
    from hvdtrain.comm.horovod import local_rank, local_size
    from hvdtrain.jax.gradients import allreduce_gradients
    from hvdtrain.jax.recipe import Recipe
    from hvdtrain.jax.state import broadcast
    from hvdtrain.jax.world import init
    from hvdtrain.recipe.options import option

__all__ = ["Recipe", "allreduce_gradients", "broadcast", "init", "local_rank", "local_size", "option", "rank", "size"]

_MODULES = {
    "Recipe": "hvdtrain.jax.recipe",
    "allreduce_gradients": "hvdtrain.jax.gradients",
    "broadcast": "hvdtrain.jax.state",
    "init": "hvdtrain.jax.world",
    "local_rank": "hvdtrain.comm.horovod",
    "local_size": "hvdtrain.comm.horovod",
    "option": "hvdtrain.recipe.options",
    "rank": "hvdtrain.comm.collectives",
    "size": "hvdtrain.comm.collectives",
}

__getattr__ = make_lazy_getattr(__name__, _MODULES)
