"""A recipe's source: its file and what it imports from its own folder, read once and imported from memory.

    read_source(path)   the files' bytes, found by following the imports in their syntax trees; nothing is executed
    import_source(s)    the recipe's module, out of exactly these bytes
    write_copy, read_copy   RUN_DIR/source/, from which newcomers of an elastic run import the same bytes

What runs is what was read: an edit of a file in mid-run changes neither a rank that starts later nor what the ranks
compare. Modules keep the paths of the original files as `__file__`, so that data next to them is found.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from hvdtrain.system.errors import UserError
from hvdtrain.system.other_frameworks import guard_tensorflow_import
from hvdtrain.system.recipe_errors import describe_error, describe_import_error

OWN_PACKAGE = "hvdtrain"
SHIPPED_RECIPES = Path(__file__).parents[1] / "recipes"
if not SHIPPED_RECIPES.is_dir():  # an editable install: the recipes are next to the package
    SHIPPED_RECIPES = Path(__file__).parents[2] / "recipes"
added_folders: set[str] = set()  # to sys.path, by this module


@dataclass(frozen=True)
class RecipeSource:
    """Files of a recipe.

    Attributes:
        root: the folder that its own modules are imported from: the file's, or that of the outermost package around it
            if the file has relative imports.
        main: the recipe's file, relative to root.
        module: the name that its module gets.
        relative: the file has relative imports.
        files: the bytes of each file by its path relative to root, with slashes; `main` is the first.
        shown: the path of the recipe's file as the user wrote it, for messages.
    """

    root: Path
    main: str
    module: str
    has_relative_imports: bool
    files: dict[str, bytes]
    display_path: Path

    @property
    def main_path(self) -> Path:
        return self.root / self.main

    @property
    def content_digest(self) -> str:
        """Return a hash of all files and their paths."""
        return hashlib.sha256(repr(sorted(self.file_digests.items())).encode()).hexdigest()

    @property
    def file_digests(self) -> dict[str, str]:
        """Return a hash of each file, by its relative path."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}


imported_sources: dict[str, RecipeSource] = {}  # by the name of the recipe's module


def parse_file(path: Path, data: bytes) -> ast.Module:
    """Return a file's syntax tree. Raises UserError with the line if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an invalid "\d": Python shows them where the file runs
            return ast.parse(data, filename=str(path))
    except SyntaxError as error:
        line = f" (line {error.lineno})" if error.lineno else ""
        raise UserError(f"{path} cannot be imported: SyntaxError: {error.msg}{line}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested too deeply
        raise UserError(f"{path} cannot be imported: {describe_error(error)}") from error


def read_source(path: Path) -> RecipeSource:
    """Read a recipe's file and, as far as the imports in the files show, what it needs from its own folder.

    Of a package in the folder every module is read: which of them are imported may be decided at run time.
    Raises UserError if the file cannot be read or does not parse.
    """
    main, tree = _read_and_parse(path)
    root = main.root
    files = dict(main.files)
    # Packages of a folder without __init__.py: relative imports mean the folder itself.
    waiting = [(tree, main.module.rpartition(".")[0])]
    while waiting:
        tree, package = waiting.pop()
        for name in imported_modules(tree, package):
            for found in own_files(root, name):
                file = found.relative_to(root).as_posix()
                if file in files:
                    continue
                try:
                    files[file] = found.read_bytes()
                    inner = parse_file(found, files[file])
                except (OSError, UserError):
                    continue  # if it is needed, its import reports it
                parts = found.relative_to(root).with_suffix("").parts
                waiting.append((inner, ".".join(parts[:-1])))
    return replace(main, files=files)


def read_main_file(path: Path) -> RecipeSource:
    """Read a file without what it imports. Raises UserError if it cannot be read or does not parse."""
    return _read_and_parse(path)[0]


def _read_and_parse(path: Path) -> tuple[RecipeSource, ast.Module]:
    shown, path = path, path.absolute()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}") from error
    tree = parse_file(shown, data)
    root, module = path.parent, f"hvdtrain_recipe_{path.stem}"
    relative = any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    if relative:
        while (root / "__init__.py").is_file():
            root = root.parent
        if root != path.parent:
            module = ".".join(path.relative_to(root).with_suffix("").parts)
    name = path.relative_to(root).as_posix()
    return RecipeSource(root, name, module, relative, {name: data}, shown), tree


def imported_modules(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the absolute names of the modules that a file may import, anywhere in it.

    package: that the file is in; "" for one that lies in the root.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(node, package)
            if base:
                yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def absolute_name(node: ast.ImportFrom, package: str) -> str:
    """Return the module that `from ... import` takes names from, "" for the root folder itself."""
    if not node.level:
        return node.module or ""
    parents = package.split(".") if package else []
    parents = parents[: len(parents) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def own_files(root: Path, name: str) -> list[Path]:
    """Return the files of the recipe's own folder that importing a module reads; of its packages, all modules."""
    top, *rest = name.split(".")
    if not is_own_module(root, top):
        return []
    if (root / top).is_dir() and not (root / f"{top}.py").is_file():
        if (root / top / "__init__.py").is_file():
            return package_files(root / top)
        # A folder without __init__.py may be anything: only what is named is taken from it.
        path = root.joinpath(top, *rest)
        return [found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()]
    return [root / f"{top}.py"]


def package_files(folder: Path) -> list[Path]:
    """Return all modules in a package's folder, except in hidden folders and environments."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")) and f != "site-packages")
        found += [Path(where) / file for file in sorted(files) if file.endswith(".py")]
    return found


def is_own_module(root: Path, top: str) -> bool:
    """Return whether a module is of the recipe's own folder; installed ones come first, as in sys.path."""
    if top in sys.stdlib_module_names or top in (OWN_PACKAGE, "horovod", "torch", "numpy", ""):
        return False
    if not (root / f"{top}.py").is_file() and not (root / top).is_dir():
        return False
    try:
        places = [entry for entry in sys.path if entry not in added_folders and not is_same_folder(entry, root)]
        spec = importlib.machinery.PathFinder.find_spec(top, places)
    except (ImportError, ValueError):
        spec = None
    return spec is None or spec.origin is None


def is_same_folder(entry: str, folder: Path) -> bool:
    """Return whether an entry of sys.path is a certain folder."""
    return os.path.realpath(entry or ".") == os.path.realpath(folder)


class SourceLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from bytes, with the path of the file that they are from."""

    def __init__(self, fullname: str, path: str, data: bytes) -> None:
        super().__init__(fullname, path)
        self.data = data

    def get_data(self, path: str) -> bytes:
        return self.data if path == self.path else super().get_data(path)

    def get_code(self, fullname: str) -> CodeType:
        # Not from Python's cache of bytecode, which goes by the file's time, in whole seconds, and size.
        return compile(self.data, self.path, "exec", dont_inherit=True)


class SourceFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of a recipe's own folder in what was read of it."""

    def __init__(self, source: RecipeSource) -> None:
        self.source = source
        # The recipe's module is the package that relative imports of a folder without __init__.py mean.
        self.prefix = f"{source.module}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        name = fullname.removeprefix(self.prefix)
        relative = name.replace(".", "/")
        root, files = self.source.root, self.source.files
        for file, package in ((f"{relative}.py", False), (f"{relative}/__init__.py", True)):
            if file in files:
                where = str(root / file)
                loader = self.make_loader(fullname, where, files[file])
                places = [str((root / file).parent)] if package else None
                return importlib.util.spec_from_file_location(
                    fullname, where, loader=loader, submodule_search_locations=places
                )
        if any(file.startswith(f"{relative}/") for file in files) and not (root / f"{relative}.py").is_file():
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(root / relative)]
            return spec
        return None

    def make_loader(self, fullname: str, path: str, data: bytes) -> SourceLoader:
        """Return what loads a module from its bytes."""
        return SourceLoader(fullname, path, data)


def import_source(source: RecipeSource) -> ModuleType:
    """Import the recipe's module from what was read. Raises UserError, with the line, if that fails."""
    path = source.main_path
    for finder in [finder for finder in sys.meta_path if isinstance(finder, SourceFinder)]:
        if finder.source.root == source.root or finder.source.module == source.module:
            sys.meta_path.remove(finder)
    finder = SourceFinder(source)
    unload_stale_modules(source)
    sys.meta_path.insert(0, finder)
    guard_tensorflow_import()
    # What is not found by reading the imports, such as what importlib.import_module is given.
    if str(source.root) not in sys.path:
        sys.path.append(str(source.root))
        added_folders.add(str(source.root))
    in_package = "." in source.module
    as_package = source.has_relative_imports and not in_package
    loader = SourceLoader(source.module, str(path), source.files[source.main])
    spec = importlib.util.spec_from_file_location(
        source.module,
        path,
        loader=loader,
        submodule_search_locations=[str(source.root)] if as_package else None,
    )
    assert spec is not None
    try:
        if in_package:
            importlib.import_module(source.module.rpartition(".")[0])
        module = importlib.util.module_from_spec(spec)
        sys.modules[source.module] = module
        loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(source.module, None)
        raise UserError(describe_import_error(error, path, source.display_path)) from error
    imported_sources[source.module] = source
    return module


def source_of_class(cls: type) -> RecipeSource | None:
    """Return the source of a recipe's class, also of one that a script defines; None if no file is known."""
    if cls.__module__ in imported_sources:
        return imported_sources[cls.__module__]
    path = Path(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")
    return read_source(path) if path.suffix == ".py" and path.is_file() else None


def unload_stale_modules(source: RecipeSource) -> None:
    """Remove modules from sys.modules that have a name of the source's own and come from elsewhere, or are older."""
    for file, data in source.files.items():
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for fullname in (name, f"{source.module}.{name}"):
            module = sys.modules.get(fullname)
            loader: Any = getattr(module, "__loader__", None)
            if module is not None and getattr(loader, "data", None) != data:
                del sys.modules[fullname]
