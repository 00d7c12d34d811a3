"""Registries of what people add: compressors, frameworks, launchers, schedulers, notice sources, loggers.

A component is one file that registers itself when it is imported. Those of hvdtrain are the modules of one package;
those of other distributions are named in an entry point group, such as `hvdtrain.compressors`, whose value is the
registered object (`my_package.my_module:MyCompressor`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from hvdtrain.system.errors import UserError, suggest_nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Components of one kind by name, loaded when they are asked for."""

    def __init__(self, kind: str, group: str, package: str) -> None:
        """Make an empty registry.

        Args:
            kind: what a component is, for messages, e.g. "compressor".
            group: the entry point group in which other distributions name theirs, e.g. "hvdtrain.compressors".
            package: the package whose modules register hvdtrain's own, e.g. "hvdtrain.compression.codecs".
        """
        self.kind = kind
        self.group = group
        self.package = package
        self._components: dict[str, T] = {}
        self._has_own = False

    def register(self, name: str, component: T) -> T:
        """Add a component; return it. Raises ValueError for a name that another one has."""
        if self._components.setdefault(name, component) is not component:
            raise ValueError(f"two components are registered as the {self.kind} {name!r}")
        return component

    def names(self) -> list[str]:
        """Return all names: hvdtrain's own in the order of registration, then those of other distributions."""
        self._load_own()
        return list(dict.fromkeys([*self._components, *self._entry_points()]))

    def get(self, name: str) -> T:
        """Return a component. Raises UserError for a name that is not registered, or cannot be loaded."""
        self._load_own()
        if name not in self._components and name in (found := self._entry_points()):
            self._load_entry_point(name, found[name])
        if name not in self._components:
            raise UserError(
                f"{name!r} is not a {self.kind}; expected one of {', '.join(self.names())}"
                f"{suggest_nearest(name, self.names())}"
            )
        return self._components[name]

    def load_all(self) -> dict[str, T]:
        """Return all components by name, those of other distributions included. Raises UserError as `get` does."""
        return {name: self.get(name) for name in self.names()}

    def _load_own(self) -> None:
        if not self._has_own:
            self._has_own = True  # before the imports, which may ask the registry themselves
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
                importlib.import_module(module.name)

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _load_entry_point(self, name: str, point: EntryPoint) -> None:
        source = f"the {self.kind} {name!r} of {point.dist.name if point.dist else point.value}"
        try:
            point.load()
        except Exception as error:
            raise UserError(
                f"{source} cannot be loaded: {type(error).__name__}: {error}; repair or uninstall that package"
            ) from error
        if name not in self._components:
            raise UserError(f"{source} does not register itself under that name when {point.value} is imported")


def registering(registry: Registry[T], name: str) -> Callable[[T], T]:
    """Return a decorator that registers a class or function under `name`."""
    return lambda component: registry.register(name, component)
