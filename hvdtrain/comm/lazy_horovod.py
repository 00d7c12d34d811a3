"""Horovod, imported when it is first used: a process that only uses torch.distributed's groups need not have it."""

from __future__ import annotations

import importlib
from typing import Any


class LazyHorovod:
    """Horovod's torch binding, which is imported when an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("horovod.torch"), name)


def load_peers_lost() -> type[Exception]:
    """Return what Horovod's collectives raise when another rank has died or left."""
    return importlib.import_module("horovod.common.exceptions").HorovodInternalError  # type: ignore[no-any-return]


class Column:
    """All ranks of Horovod's world, as the group of a collective: in a grid they are a column of it."""

    def rank(self) -> int:
        """Return this process's rank among them."""
        return LazyHorovod().rank()  # type: ignore[no-any-return]

    def size(self) -> int:
        """Return their number."""
        return LazyHorovod().size()  # type: ignore[no-any-return]
