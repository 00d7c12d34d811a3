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
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.recipe.source import OWN_PACKAGE, RecipeSource, absolute_name, is_own, own_files, parse_file, read_source
from hvdtrain.system.errors import UserError

# Packages that have no recipe in them, so that `class Net(torch.nn.Module)` runs no file.
WITHOUT_RECIPES = frozenset(
    (
        *("torch", "torchvision", "torchaudio", "numpy", "scipy", "pandas", "sklearn", "matplotlib", "PIL", "cv2"),
        *("horovod", "mpi4py", "lightning", "pytorch_lightning", "transformers", "accelerate", "datasets", "timm"),
        *("tensorflow", "keras", "jax", "flax", "optax", "einops", "h5py", "tqdm", "rich", "click", "yaml"),
        *("pydantic", "attr", "attrs", "pytest", "requests", "setuptools", "psutil", "six", "typing_extensions"),
    )
)


class Leads(enum.IntEnum):
    """Where a base class leads to; of several possible ones, the largest counts."""

    NO = 0
    UNKNOWN = 1
    RECIPE = 2


@dataclass(frozen=True)
class SeenClass:
    """A class that is or may be a recipe."""

    name: str
    leads: Leads
    framework: str  # of the Recipe that it leads to; "" if that is unknown
    summary: str  # first line of its docstring


@dataclass(frozen=True)
class Base:
    """What is known of an expression that stands for a class."""

    leads: Leads
    framework: str = ""


NO, UNKNOWN = Base(Leads.NO), Base(Leads.UNKNOWN)


@dataclass
class Module:
    """A file's names: what each may be bound to at its top level, `if`, `try`, `with` and loops included."""

    root: Path  # of the recipe's own modules
    package: str
    names: dict[str, list[ast.AST]] = field(default_factory=dict)
    imports: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # name: (module, name in it or "")
    stars: list[str] = field(default_factory=list)
    declared_global: set[str] = field(default_factory=set)  # in functions: anything may be bound to these


def read_classes(source: RecipeSource) -> list[SeenClass]:
    """The classes at the top level of a recipe's file that are recipes or may be, in their order.

    Raises UserError if the file does not parse.
    """
    reader = _Reader(source.root)
    package = source.module.rpartition(".")[0]
    module = reader.read(parse_file(source.shown, source.files[source.main]), package)
    found = {}
    for name, bound in module.names.items():
        for node in bound:
            base = reader.base_of_class(node, module) if isinstance(node, ast.ClassDef) else NO
            if isinstance(node, ast.ClassDef) and base.leads > Leads.NO:
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                found[name] = SeenClass(name, base.leads, base.framework, summary)
    return list(found.values())


class _Reader:
    """Follows names through the modules of one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, Module | None] = {}
        self.active: set[tuple[int, str]] = set()  # names that are being followed, which may lead back to themselves

    def read(self, tree: ast.Module, package: str) -> Module:
        module = Module(self.root, package)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                module.declared_global.update(node.names)
        for statement in top_level(tree.body):
            self._bind(module, statement)
        return module

    def _bind(self, module: Module, node: ast.stmt) -> None:
        set_by_statement: list[ast.expr] = []  # targets of loops, `with` and unpackings
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                module.imports.setdefault(name, []).append((alias.name if alias.asname else name, ""))
        elif isinstance(node, ast.ImportFrom):
            source = absolute_name(node, module.package)
            for alias in node.names:
                if alias.name == "*":
                    module.stars.append(source)
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
        for target_name in names_in(set_by_statement):
            module.names.setdefault(target_name, []).append(node)  # which cannot be followed

    def base_of_class(self, node: ast.ClassDef, module: Module) -> Base:
        return largest(self.follow(base, module) for base in node.bases)

    def follow(self, node: ast.AST, module: Module) -> Base:
        """Where an expression leads that is used as a base class."""
        if isinstance(node, ast.ClassDef):
            return self.base_of_class(node, module)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Constant)):
            return NO
        if isinstance(node, ast.Subscript):  # Base[int]; of anything else it is not known
            inner = self.follow(node.value, module)
            return inner if isinstance(node.value, (ast.Name, ast.Attribute)) else UNKNOWN
        if isinstance(node, ast.IfExp):
            return largest([self.follow(node.body, module), self.follow(node.orelse, module)])
        if isinstance(node, ast.BoolOp):
            return largest(self.follow(value, module) for value in node.values)
        if isinstance(node, ast.NamedExpr):
            return self.follow(node.value, module)
        if isinstance(node, ast.Call):  # NamedTuple("P", ...), type(x): only what is known to return no recipe
            return NO if self._without_recipes(node.func, module) else UNKNOWN
        chain = dotted(node)
        if chain is None:
            return UNKNOWN
        return self.follow_name(chain[0], chain[1:], module)

    def follow_name(self, name: str, attributes: list[str], module: Module) -> Base:
        """Where `name.a.b`, seen in a module, leads."""
        key = (id(module), ".".join([name, *attributes]))
        if key in self.active:
            return NO
        self.active.add(key)
        try:
            found = [UNKNOWN] if name in module.declared_global else []
            for node in module.names.get(name, []):
                found.append(self._follow_bound(node, attributes, module))
            for source, imported in module.imports.get(name, []):
                found.append(self.follow_module(source, [*([imported] if imported else []), *attributes]))
            if not found:
                found = [self.follow_module(star, [name, *attributes]) for star in module.stars]
                if hasattr(builtins, name):
                    found = [base for base in found if base.leads == Leads.RECIPE]
            return largest(found)
        finally:
            self.active.remove(key)

    def _follow_bound(self, node: ast.AST, attributes: list[str], module: Module) -> Base:
        if not attributes:
            return self.follow(node, module)
        if isinstance(node, ast.ClassDef):  # a class in a class
            inner = self.read(ast.Module(node.body, []), module.package)
            inner.imports = {**module.imports, **inner.imports}
            inner.names = {**module.names, **inner.names}
            inner.stars = module.stars
            return self.follow_name(attributes[0], attributes[1:], inner)
        chain = dotted(node)
        return self.follow_name(chain[0], [*chain[1:], *attributes], module) if chain else UNKNOWN

    def follow_module(self, name: str, attributes: list[str]) -> Base:
        """Where `attributes` of a module, by its absolute name, lead."""
        top = name.partition(".")[0]
        if top == OWN_PACKAGE:
            return self._own(f"{name}.{'.'.join(attributes)}")
        module = self._module(name)
        if module is None:
            if not name and attributes:  # from . import base, in a folder without __init__.py
                return self.follow_module(attributes[0], attributes[1:])
            if self._is_folder(name) and attributes:
                return self.follow_module(f"{name}.{attributes[0]}", attributes[1:])
            return NO if is_without_recipes(top) else UNKNOWN
        if not attributes:
            return NO  # a module is not a class
        first, rest = attributes[0], attributes[1:]
        if first in module.names or first in module.imports or first in module.declared_global:
            return self.follow_name(first, rest, module)
        if self._module(f"{name}.{first}") is not None or self._is_folder(f"{name}.{first}"):
            return self.follow_module(f"{name}.{first}", rest)
        if "__getattr__" in module.names:
            return UNKNOWN
        return self.follow_name(first, rest, module)

    def _own(self, name: str) -> Base:
        """Where a name of hvdtrain's leads: to a framework's Recipe, or to a recipe that hvdtrain ships."""
        parts = name.split(".")
        if parts[-1] == "Recipe":
            return Base(Leads.RECIPE, parts[1] if len(parts) > 2 and parts[1] != "recipe" else "")
        if parts[1] == "recipes" and len(parts) == 4:
            from hvdtrain.recipe.registry import SHIPPED

            path = SHIPPED / f"{parts[2]}.py"
            if path.is_file():
                seen = {cls.name: cls for cls in read_classes(read_source(path))}
                return Base(seen[parts[3]].leads, seen[parts[3]].framework) if parts[3] in seen else NO
        return NO

    def _is_folder(self, name: str) -> bool:
        """Whether a module is a folder without __init__.py, next to the recipe."""
        return is_own(self.root, name.partition(".")[0]) and self.root.joinpath(*name.split(".")).is_dir()

    def _module(self, name: str) -> Module | None:
        """The names of a module of the recipe's own folder, None for any other."""
        if name not in self.modules:
            self.modules[name] = None
            path = self.root.joinpath(*name.split("."))
            wanted = (path.with_suffix(".py"), path / "__init__.py") if name else ()
            for file in own_files(self.root, name) if name else []:
                if file in wanted:
                    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                    try:
                        self.modules[name] = self.read(parse_file(file, file.read_bytes()), package)
                    except (OSError, UserError):
                        continue
        return self.modules[name]

    def _without_recipes(self, node: ast.AST, module: Module) -> bool:
        """Whether a function that is called is one of a package without recipes, or Python's own."""
        chain = dotted(node)
        if chain is None:
            return False
        if chain[0] in module.names or chain[0] in module.declared_global:
            return False
        sources = [source for source, _ in module.imports.get(chain[0], [])]
        return bool(sources) and all(is_without_recipes(source.partition(".")[0]) for source in sources)


def top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that bind names of a module, those in `if`, `try`, `with`, `match` and loops included."""
    for node in body:
        yield node
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from top_level(getattr(node, name, []))
        for part in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from top_level(part.body)


def names_in(targets: Iterable[ast.expr]) -> list[str]:
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def dotted(node: ast.AST) -> list[str] | None:
    """The parts of `a.b.c`; None for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else None


def is_without_recipes(top: str) -> bool:
    """Whether a package, by its name, is known to have no recipe in it."""
    return top in sys.stdlib_module_names or top in WITHOUT_RECIPES


def largest(bases: Iterable[Base]) -> Base:
    return max(bases, key=lambda base: base.leads, default=NO)
