"""hvdtrain: exact, fast training on Horovod. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdtrain.collectives.world import init
    from hvdtrain.trainer.fit import fit

__version__ = "0.1.0"
__all__ = ["__version__", "fit", "init"]


def __getattr__(name: str) -> Any:
    # Lazily: `hvdtrain --help` must not import torch.
    if name == "fit":
        from hvdtrain.trainer.fit import fit

        return fit
    if name == "init":
        from hvdtrain.collectives.world import init

        return init
    raise AttributeError(f"module 'hvdtrain' has no attribute {name!r}")
