"""hvdtrain: exact, fast training on Horovod. See README.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hvdtrain.system.version import __version__

if TYPE_CHECKING:
    from hvdtrain.comm.world import init
    from hvdtrain.recipe.base import Recipe
    from hvdtrain.recipe.now import Now
    from hvdtrain.recipe.options import option
    from hvdtrain.recipe.tensorboard import tensorboard
    from hvdtrain.system.errors import RunError, UserError
    from hvdtrain.training.fit import fit
    from hvdtrain.training.loading import load

__all__ = ["Now", "Recipe", "RunError", "UserError", "__version__", "fit", "init", "load", "option", "tensorboard"]

_MODULES = {
    "Now": "hvdtrain.recipe.now",
    "Recipe": "hvdtrain.recipe.base",
    "RunError": "hvdtrain.system.errors",
    "UserError": "hvdtrain.system.errors",
    "fit": "hvdtrain.training.fit",
    "init": "hvdtrain.comm.world",
    "load": "hvdtrain.training.loading",
    "option": "hvdtrain.recipe.options",
    "tensorboard": "hvdtrain.recipe.tensorboard",
}


def __getattr__(name: str) -> Any:
    # Lazily: `hvdtrain --help` must not import torch.
    if name not in _MODULES:
        raise AttributeError(f"module 'hvdtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
