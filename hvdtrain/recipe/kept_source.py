"""Import the source that a run folder keeps, next to whatever else is imported under the same names.

    RUN_DIR/source/mine.py       -> hvdtrain_kept_1f0c.mine       what `import sizes` means in one of these files is
                   sizes.py      -> hvdtrain_kept_1f0c.sizes      decided by the file's own __import__: kept files first

A module `sizes` of the user's stays what it is, and none of these files sees it. Importing executes the kept files.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.registry import choose_default_class
from hvdtrain.recipe.source import RecipeSource, SourceFinder, SourceLoader, imported_sources, read_source
from hvdtrain.system.errors import UserError
from hvdtrain.system.other_frameworks import guard_tensorflow_import
from hvdtrain.system.recipe_errors import describe_import_error

_importing: list[str] = []  # kept files that are being imported


def check_not_importing(call: str) -> None:
    """Raise UserError if a kept source is being imported: a call that starts a training would train again."""
    if _importing:
        raise UserError(
            f"{_importing[-1]} calls {call} when it is imported: put what it runs under `if __name__ == '__main__':`"
        )


def load_kept_class(source: RecipeSource, name: str, class_name: str | None) -> type[Recipe]:
    """Return a run's recipe class from its kept source, which is executed unless it is the running script's own.

    Args:
        source: the kept files; `display_path` is that of the recipe's in the run folder.
        name: of the recipe in the run folder.
        class_name: the qualified name of the class; None: of an earlier hvdtrain, which did not write it.

    Raises:
        UserError: it cannot be imported, or has no such class.
    """
    if class_name is not None and "<locals>" in class_name:
        raise UserError(
            f"the run's recipe {class_name} is defined in a function, so that it cannot be loaded: define it at the "
            "top of a file"
        )
    module = find_running_script(source) or import_kept_source(source)
    class_name = class_name or guess_class_name(module, source, name)
    found: Any = module
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise UserError(
            f"{source.display_path} has no recipe class {class_name!r}; give it: hvdtrain.load(..., cls=Mine)"
        )
    return found


def guess_class_name(module: ModuleType, source: RecipeSource, name: str) -> str:
    """Return which class of a module a run's recipe is, by the name that it has in the run folder."""
    classes = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == module.__name__
    ]
    _, colon, after = name.rpartition(":")
    by_name = next((key for key in classes if key.lower() == name), None)  # as `hvdtrain.fit` names it
    return after if colon else choose_default_class(Path(source.main), classes) or by_name or name


def find_running_script(source: RecipeSource) -> ModuleType | None:
    """Return __main__ if it is this very source: a script that trains and then loads its own run."""
    script = sys.modules.get("__main__")
    path = Path(getattr(script, "__file__", None) or "")
    if script is None or path.name != Path(source.main).name or not path.is_file():
        return None
    try:
        return script if read_source(path).files == source.files else None
    except UserError:
        return None


def import_kept_source(source: RecipeSource) -> ModuleType:
    """Import a run's kept source under a name of its own; the same files at the same place are imported once.

    Raises:
        UserError: that fails, with the line.
    """
    identity = hashlib.sha256(f"{source.root}\n{source.content_digest}".encode()).hexdigest()
    package = f"hvdtrain_kept_{identity[:16]}"
    name = f"{package}.{source.main.removesuffix('.py').replace('/', '.')}"
    if name in sys.modules:
        return sys.modules[name]
    finder = KeptSourceFinder(source, package)
    parent = ModuleType(package)
    parent.__path__ = []  # no folder is searched
    sys.modules[package] = parent
    sys.meta_path.insert(0, finder)
    guard_tensorflow_import()
    _importing.append(str(source.display_path))
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        sys.meta_path.remove(finder)
        for key in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
            del sys.modules[key]
        if isinstance(error, UserError):
            raise
        raise UserError(describe_import_error(error, source.main_path, source.display_path)) from error
    finally:
        _importing.pop()
    imported_sources[name] = source
    return module


class KeptSourceFinder(SourceFinder):
    """Finds the modules of one kept source, below a package of its own, and nowhere else."""

    def __init__(self, source: RecipeSource, package: str) -> None:
        super().__init__(source)
        self.package, self.prefix = package, f"{package}."
        self.own_names = {file.partition("/")[0].removesuffix(".py") for file in source.files}
        self.builtins: Mapping[str, object] = {**vars(builtins), "__import__": self.import_module}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self.prefix):
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec.submodule_search_locations = []
        return spec

    def make_loader(self, fullname: str, path: str, data: bytes) -> SourceLoader:
        return KeptSourceLoader(fullname, path, data, self.builtins)

    def import_module(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """Do what the statement `import` does in a kept file: Python's __import__, with kept files first."""
        top = name.partition(".")[0]
        if level or top not in self.own_names:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        module = builtins.__import__(f"{self.prefix}{name}", globals, locals, fromlist or (), 0)
        return module if fromlist else sys.modules[f"{self.prefix}{top}"]


class KeptSourceLoader(SourceLoader):
    """Loads a kept file with builtins of its own."""

    def __init__(self, fullname: str, path: str, data: bytes, own_builtins: Mapping[str, object]) -> None:
        super().__init__(fullname, path, data)
        self.own_builtins = dict(own_builtins)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self.own_builtins
        super().exec_module(module)
