"""hvdtrain: exact, fast training on Horovod. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdtrain.system.lazy_names import make_lazy_getattr
from hvdtrain.system.version import __version__

if TYPE_CHECKING:
    from hvdtrain.cli.fit import fit
    from hvdtrain.comm.world import init
    from hvdtrain.programs.diagnose import diagnose
    from hvdtrain.recipe.base import Recipe
    from hvdtrain.recipe.now import Now
    from hvdtrain.recipe.options import option
    from hvdtrain.recipe.tensorboard import tensorboard
    from hvdtrain.system.errors import RunError, UserError
    from hvdtrain.training.loading import load

__all__ = [
    "Now",
    "Recipe",
    "RunError",
    "UserError",
    "__version__",
    "diagnose",
    "fit",
    "init",
    "load",
    "option",
    "tensorboard",
]

_MODULES = {
    "Now": "hvdtrain.recipe.now",
    "Recipe": "hvdtrain.recipe.base",
    "RunError": "hvdtrain.system.errors",
    "UserError": "hvdtrain.system.errors",
    "diagnose": "hvdtrain.programs.diagnose",
    "fit": "hvdtrain.cli.fit",
    "init": "hvdtrain.comm.world",
    "load": "hvdtrain.training.loading",
    "option": "hvdtrain.recipe.options",
    "tensorboard": "hvdtrain.recipe.tensorboard",
}


# Lazily: `hvdtrain --help` must not import torch.
__getattr__ = make_lazy_getattr(__name__, _MODULES)
