"""Names of a package whose modules are imported when the name is first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from hvdtrain.system.extras import explain_missing_extra


def make_lazy_getattr(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package (PEP 562); it reports in one line an extra of hvdtrain that is missing.

    Args:
        package: its name.
        modules: by name, the module that defines it, or that has this name in the package.
    """

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(modules[name])
        except ModuleNotFoundError as error:
            missing = explain_missing_extra(error)
            if missing is None:
                raise
            raise ModuleNotFoundError(missing, name=error.name) from None
        return module if modules[name] == f"{package}.{name}" else getattr(module, name)

    return get_attribute
