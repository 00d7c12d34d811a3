"""Which classes of a file can be recipes, by its syntax alone.

A class's bases are followed through names, imports and files of the recipe's own folder until they reach a framework's
Recipe (RECIPE), something that cannot lead to one (NO: the standard library, torch, a class without bases), or
something that only running the file would show (UNKNOWN: an installed package, a call).
"""

from __future__ import annotations

import ast
import builtins
import enum
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hvdtrain.recipe.source import (
    OWN_PACKAGE,
    SHIPPED_RECIPES,
    RecipeSource,
    absolute_name,
    is_own_module,
    own_files,
    parse_file,
    read_source,
)
from hvdtrain.system.errors import UserError

# Packages that have no recipe in them, so that `class Net(torch.nn.Module)` runs no file.
RECIPE_FREE_PACKAGES = frozenset(
    (
        *("torch", "torchvision", "torchaudio", "numpy", "scipy", "pandas", "sklearn", "matplotlib", "PIL", "cv2"),
        *("horovod", "mpi4py", "lightning", "pytorch_lightning", "transformers", "accelerate", "datasets", "timm"),
        *("tensorflow", "keras", "jax", "flax", "optax", "einops", "h5py", "tqdm", "rich", "click", "yaml"),
        *("pydantic", "attr", "attrs", "pytest", "requests", "setuptools", "psutil", "six", "typing_extensions"),
    )
)


class RecipeStatus(enum.IntEnum):
    """Where a base class leads to; of several possible ones, the largest counts."""

    NOT_RECIPE = 0
    UNKNOWN = 1
    RECIPE = 2


@dataclass(frozen=True)
class CandidateClass:
    """A class that is or may be a recipe."""

    name: str
    status: RecipeStatus
    framework: str  # of the Recipe that it leads to; "" if that is unknown
    summary: str  # first line of its docstring
    domain: str  # as it or a base declares it; "" if none does


@dataclass(frozen=True)
class ResolvedBase:
    """What is known of an expression that names a class."""

    status: RecipeStatus
    framework: str = ""
    domain: str = ""


NO_RECIPE_BASE, UNKNOWN_BASE = ResolvedBase(RecipeStatus.NOT_RECIPE), ResolvedBase(RecipeStatus.UNKNOWN)


@dataclass
class ModuleNames:
    """A file's names: what each may be bound to at its top level, `if`, `try`, `with` and loops included."""

    root: Path  # of the recipe's own modules
    package: str
    names: dict[str, list[ast.AST]] = field(default_factory=dict)
    imports: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # name: (module, name in it or "")
    star_imports: list[str] = field(default_factory=list)
    declared_global: set[str] = field(default_factory=set)  # in functions: anything may be bound to these


def read_classes(source: RecipeSource) -> list[CandidateClass]:
    """Return the classes at the top level of a recipe's file that are recipes or may be, in their order.

    Raises UserError if the file does not parse.
    """
    reader = _NameResolver(source.root)
    package = source.module.rpartition(".")[0]
    module = reader.collect_names(parse_file(source.display_path, source.files[source.main]), package)
    found = {}
    for name, bound in module.names.items():
        for node in bound:
            base = reader.resolve_class(node, module) if isinstance(node, ast.ClassDef) else NO_RECIPE_BASE
            if isinstance(node, ast.ClassDef) and base.status > RecipeStatus.NOT_RECIPE:
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                found[name] = CandidateClass(name, base.status, base.framework, summary, base.domain)
    return list(found.values())


class _NameResolver:
    """Follows names through the modules of one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, ModuleNames | None] = {}
        self.resolving: set[tuple[int, str]] = set()  # names that are being followed, which may lead back to themselves

    def collect_names(self, tree: ast.Module, package: str) -> ModuleNames:
        module = ModuleNames(self.root, package)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                module.declared_global.update(node.names)
        for statement in iterate_top_level(tree.body):
            self._bind_statement(module, statement)
        return module

    def _bind_statement(self, module: ModuleNames, node: ast.stmt) -> None:
        set_by_statement: list[ast.expr] = []  # targets of loops, `with` and unpackings
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                module.imports.setdefault(name, []).append((alias.name if alias.asname else name, ""))
        elif isinstance(node, ast.ImportFrom):
            source = absolute_name(node, module.package)
            for alias in node.names:
                if alias.name == "*":
                    module.star_imports.append(source)
                else:
                    module.imports.setdefault(alias.asname or alias.name, []).append((source, alias.name))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            module.names.setdefault(node.name, []).append(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    module.names.setdefault(target.id, []).append(node.value)
            set_by_statement += [target for target in targets if not isinstance(target, ast.Name)]
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.With, ast.AsyncWith, ast.If, ast.While, ast.Expr)):
            for inner in ast.walk(node):
                if isinstance(inner, ast.NamedExpr):
                    module.names.setdefault(inner.target.id, []).append(inner.value)
            if isinstance(node, (ast.For, ast.AsyncFor)):
                set_by_statement.append(node.target)
            if isinstance(node, (ast.With, ast.AsyncWith)):
                set_by_statement += [item.optional_vars for item in node.items if item.optional_vars is not None]
        for target_name in names_in_targets(set_by_statement):
            module.names.setdefault(target_name, []).append(node)  # which cannot be followed

    def resolve_class(self, node: ast.ClassDef, module: ModuleNames) -> ResolvedBase:
        base = strongest_base(self.resolve_expression(base, module) for base in node.bases)
        return replace(base, domain=find_domain(node) or base.domain)

    def resolve_expression(self, node: ast.AST, module: ModuleNames) -> ResolvedBase:
        """Return where an expression leads that is used as a base class."""
        if isinstance(node, ast.ClassDef):
            return self.resolve_class(node, module)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Constant)):
            return NO_RECIPE_BASE
        if isinstance(node, ast.Subscript):  # Base[int]; of anything else it is not known
            inner = self.resolve_expression(node.value, module)
            return inner if isinstance(node.value, (ast.Name, ast.Attribute)) else UNKNOWN_BASE
        if isinstance(node, ast.IfExp):
            return strongest_base(
                [self.resolve_expression(node.body, module), self.resolve_expression(node.orelse, module)]
            )
        if isinstance(node, ast.BoolOp):
            return strongest_base(self.resolve_expression(value, module) for value in node.values)
        if isinstance(node, ast.NamedExpr):
            return self.resolve_expression(node.value, module)
        if isinstance(node, ast.Call):  # NamedTuple("P", ...), type(x): only what is known to return no recipe
            return NO_RECIPE_BASE if self._is_recipe_free_call(node.func, module) else UNKNOWN_BASE
        chain = dotted_parts(node)
        if chain is None:
            return UNKNOWN_BASE
        return self.resolve_name(chain[0], chain[1:], module)

    def resolve_name(self, name: str, attributes: list[str], module: ModuleNames) -> ResolvedBase:
        """Return where `name.a.b`, seen in a module, leads."""
        key = (id(module), ".".join([name, *attributes]))
        if key in self.resolving:
            return NO_RECIPE_BASE
        self.resolving.add(key)
        try:
            found = [UNKNOWN_BASE] if name in module.declared_global else []
            for node in module.names.get(name, []):
                found.append(self._resolve_bound(node, attributes, module))
            for source, imported in module.imports.get(name, []):
                found.append(self.resolve_module(source, [*([imported] if imported else []), *attributes]))
            if not found:
                found = [self.resolve_module(star, [name, *attributes]) for star in module.star_imports]
                if hasattr(builtins, name):
                    found = [base for base in found if base.status == RecipeStatus.RECIPE]
            return strongest_base(found)
        finally:
            self.resolving.remove(key)

    def _resolve_bound(self, node: ast.AST, attributes: list[str], module: ModuleNames) -> ResolvedBase:
        if not attributes:
            return self.resolve_expression(node, module)
        if isinstance(node, ast.ClassDef):  # a class in a class
            inner = self.collect_names(ast.Module(node.body, []), module.package)
            inner.imports = {**module.imports, **inner.imports}
            inner.names = {**module.names, **inner.names}
            inner.star_imports = module.star_imports
            return self.resolve_name(attributes[0], attributes[1:], inner)
        chain = dotted_parts(node)
        return self.resolve_name(chain[0], [*chain[1:], *attributes], module) if chain else UNKNOWN_BASE

    def resolve_module(self, name: str, attributes: list[str]) -> ResolvedBase:
        """Return where `attributes` of a module, by its absolute name, lead."""
        top = name.partition(".")[0]
        if top == OWN_PACKAGE:
            return self._resolve_own_package(f"{name}.{'.'.join(attributes)}")
        module = self._load_module(name)
        if module is None:
            if not name and attributes:  # from . import base, in a folder without __init__.py
                return self.resolve_module(attributes[0], attributes[1:])
            if self._is_namespace_folder(name) and attributes:
                return self.resolve_module(f"{name}.{attributes[0]}", attributes[1:])
            return NO_RECIPE_BASE if is_recipe_free(top) else UNKNOWN_BASE
        if not attributes:
            return NO_RECIPE_BASE  # a module is not a class
        first, rest = attributes[0], attributes[1:]
        if first in module.names or first in module.imports or first in module.declared_global:
            return self.resolve_name(first, rest, module)
        if self._load_module(f"{name}.{first}") is not None or self._is_namespace_folder(f"{name}.{first}"):
            return self.resolve_module(f"{name}.{first}", rest)
        if "__getattr__" in module.names:
            return UNKNOWN_BASE
        return self.resolve_name(first, rest, module)

    def _resolve_own_package(self, name: str) -> ResolvedBase:
        """Return where a name of hvdtrain's leads: to a framework's Recipe, or to a recipe that hvdtrain ships."""
        parts = name.split(".")
        if parts[-1] == "Recipe":
            return ResolvedBase(RecipeStatus.RECIPE, parts[1] if len(parts) > 2 and parts[1] != "recipe" else "")
        if parts[1] == "recipes" and len(parts) == 4:
            path = SHIPPED_RECIPES / f"{parts[2]}.py"
            if path.is_file():
                seen = {cls.name: cls for cls in read_classes(read_source(path))}
                cls = seen.get(parts[3])
                return ResolvedBase(cls.status, cls.framework, cls.domain) if cls is not None else NO_RECIPE_BASE
        return NO_RECIPE_BASE

    def _is_namespace_folder(self, name: str) -> bool:
        """Return whether a module is a folder without __init__.py, next to the recipe."""
        return is_own_module(self.root, name.partition(".")[0]) and self.root.joinpath(*name.split(".")).is_dir()

    def _load_module(self, name: str) -> ModuleNames | None:
        """Return the names of a module of the recipe's own folder, None for any other."""
        if name not in self.modules:
            self.modules[name] = None
            path = self.root.joinpath(*name.split("."))
            wanted = (path.with_suffix(".py"), path / "__init__.py") if name else ()
            for file in own_files(self.root, name) if name else []:
                if file in wanted:
                    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                    try:
                        self.modules[name] = self.collect_names(parse_file(file, file.read_bytes()), package)
                    except (OSError, UserError):
                        continue
        return self.modules[name]

    def _is_recipe_free_call(self, node: ast.AST, module: ModuleNames) -> bool:
        """Return whether a function that is called is one of a package without recipes, or Python's own."""
        chain = dotted_parts(node)
        if chain is None:
            return False
        if chain[0] in module.names or chain[0] in module.declared_global:
            return False
        sources = [source for source, _ in module.imports.get(chain[0], [])]
        return bool(sources) and all(is_recipe_free(source.partition(".")[0]) for source in sources)


def iterate_top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that bind names of a module, also those in `if`, `try`, `with`, `match` and loops."""
    for node in body:
        yield node
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from iterate_top_level(getattr(node, name, []))
        for part in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from iterate_top_level(part.body)


def find_domain(node: ast.ClassDef) -> str:
    """Return the text that a class binds `domain` to; "" if it does not."""
    for inner in node.body:
        targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
        value = getattr(inner, "value", None)
        if isinstance(value, ast.Constant) and [getattr(target, "id", "") for target in targets] == ["domain"]:
            return str(value.value)
    return ""


def names_in_targets(targets: Iterable[ast.expr]) -> list[str]:
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def dotted_parts(node: ast.AST) -> list[str] | None:
    """Return the parts of `a.b.c`; None for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else None


def is_recipe_free(top: str) -> bool:
    """Return whether a package, by its name, is known to have no recipe in it."""
    return top in sys.stdlib_module_names or top in RECIPE_FREE_PACKAGES


def strongest_base(bases: Iterable[ResolvedBase]) -> ResolvedBase:
    return max(bases, key=lambda base: base.status, default=NO_RECIPE_BASE)
