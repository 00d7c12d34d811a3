"""What frameworks do before the file of one of their recipes is imported."""

from __future__ import annotations

from collections.abc import Iterable

from hvdtrain.recipe.framework import FRAMEWORKS


def prepare_imports(frameworks: Iterable[str], backend: str | None = None) -> None:
    """Let frameworks do what they must before a recipe of theirs is imported. Raises UserError if they cannot.

    Args:
        frameworks: their names; what is not one is left for `find_framework`.
        backend: as --backend, if it is given.
    """
    for name in set(frameworks) & set(FRAMEWORKS.names()):
        framework = FRAMEWORKS.get(name)
        if framework.prepare_import is not None:
            framework.prepare_import(backend)
