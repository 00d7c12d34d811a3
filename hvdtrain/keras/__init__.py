"""hvdtrain for Keras 3, on its backends JAX, TensorFlow and torch: the Recipe to subclass; and what `model.fit` needs.

For `model.fit`, the names are those of horovod.tensorflow.keras.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdtrain.system.lazy_names import make_lazy_getattr
from hvdtrain.system.other_frameworks import guard_tensorflow_import

if TYPE_CHECKING:
    from hvdtrain.keras import callbacks
    from hvdtrain.keras.optimizer import DistributedOptimizer, load_model
    from hvdtrain.keras.recipe import Recipe
    from hvdtrain.keras.schedules import TextSchedule
    from hvdtrain.keras.variables import broadcast_variables
    from hvdtrain.keras.world import init, local_rank, local_size, rank, shutdown, size
    from hvdtrain.recipe.options import option

__all__ = [
    "DistributedOptimizer",
    "Recipe",
    "TextSchedule",
    "broadcast_variables",
    "callbacks",
    "init",
    "load_model",
    "local_rank",
    "local_size",
    "option",
    "rank",
    "shutdown",
    "size",
]

_MODULES = {
    "DistributedOptimizer": "hvdtrain.keras.optimizer",
    "Recipe": "hvdtrain.keras.recipe",
    "TextSchedule": "hvdtrain.keras.schedules",
    "broadcast_variables": "hvdtrain.keras.variables",
    "callbacks": "hvdtrain.keras.callbacks",
    "init": "hvdtrain.keras.world",
    "load_model": "hvdtrain.keras.optimizer",
    "local_rank": "hvdtrain.keras.world",
    "local_size": "hvdtrain.keras.world",
    "option": "hvdtrain.recipe.options",
    "rank": "hvdtrain.keras.world",
    "shutdown": "hvdtrain.keras.world",
    "size": "hvdtrain.keras.world",
}

guard_tensorflow_import()
__getattr__ = make_lazy_getattr(__name__, _MODULES)
