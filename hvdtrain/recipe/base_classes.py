"""Where the bases of a class lead to, by the syntax of its file and of the files next to it: nothing is imported.

A name is followed through assignments, imports, and files of the script's own folder or of installed packages until it
reaches a framework's Recipe (RECIPE), something that cannot lead to one (NOT_RECIPE: the standard library, torch, a
class without bases), or something that only running the file would show (UNKNOWN: a package without source, a call).
"""

from __future__ import annotations

import ast
import builtins
import enum
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hvdtrain.recipe.base import FRAMEWORK_NAMES
from hvdtrain.recipe.source import (
    OWN_PACKAGE,
    SHIPPED_RECIPES,
    absolute_name,
    is_own_module,
    parse_file,
)
from hvdtrain.recipe.syntax import dotted_parts, find_domain, iterate_top_level, list_parameters, names_in_targets
from hvdtrain.system.errors import UserError

# Packages that have no recipe in them, so that `class Net(torch.nn.Module)` runs no file.
RECIPE_FREE_PACKAGES = frozenset(
    (
        *("torch", "torchvision", "torchaudio", "numpy", "scipy", "pandas", "sklearn", "matplotlib", "PIL", "cv2"),
        *("horovod", "mpi4py", "lightning", "pytorch_lightning", "transformers", "accelerate", "datasets", "timm"),
        *("tensorflow", "keras", "jax", "jaxlib", "flax", "optax", "equinox", "chex", "ml_dtypes", "einops", "h5py"),
        *("pydantic", "attr", "attrs", "pytest", "requests", "setuptools", "psutil", "six", "typing_extensions"),
        *("click", "rich", "tqdm", "yaml"),
    )
)


class RecipeStatus(enum.IntEnum):
    """Where a base class leads to; of several possible ones, the largest counts."""

    NOT_RECIPE = 0
    UNKNOWN = 1
    RECIPE = 2


@dataclass(frozen=True)
class ResolvedBase:
    """What is known of an expression that names a class."""

    status: RecipeStatus
    framework: str = ""
    domain: str = ""


Scope = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
NO_RECIPE_BASE, UNKNOWN_BASE = ResolvedBase(RecipeStatus.NOT_RECIPE), ResolvedBase(RecipeStatus.UNKNOWN)


@dataclass
class ModuleNames:
    """A file's names: what each may be bound to at its top level, `if`, `try`, `with` and loops included."""

    package: str
    is_installed: bool = False  # of a package that may bind names in ways that are not followed
    names: dict[str, list[ast.AST]] = field(default_factory=dict)
    imports: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # name: (module, name in it or "")
    star_imports: list[str] = field(default_factory=list)
    declared_global: set[str] = field(default_factory=set)  # in functions: anything may be bound to these
    set_anywhere: set[str] = field(default_factory=set)  # also by statements that are not followed, such as `match`


class NameResolver:
    """Follows names through the modules of one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, ModuleNames | None] = {}
        self.resolving: set[tuple[int, str]] = set()  # names that are being followed, which may lead back to themselves

    def collect_names(self, tree: ast.Module, package: str) -> ModuleNames:
        module = ModuleNames(package)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                module.declared_global.update(node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                module.set_anywhere.add(node.id)
            elif isinstance(node, (ast.MatchAs, ast.MatchStar, ast.ExceptHandler)) and node.name:
                module.set_anywhere.add(node.name)
        for statement in iterate_top_level(tree.body):
            self._bind_statement(module, statement)
        return module

    def collect_inner_names(self, node: Scope, outer: ModuleNames) -> ModuleNames:
        """Return the names that are seen in a class or function: its own, its parameters, and those around it."""
        inner = self.collect_names(ast.Module(node.body, []), outer.package)
        parameters = [] if isinstance(node, ast.ClassDef) else list_parameters(node.args)
        inner.names = {**outer.names, **{one.arg: [one] for one in parameters}, **inner.names}
        inner.imports = {**outer.imports, **inner.imports}
        inner.star_imports = [*outer.star_imports, *inner.star_imports]
        inner.declared_global |= outer.declared_global
        inner.set_anywhere |= outer.set_anywhere
        return inner

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
            if self._is_own_call(node, module, "load_recipe"):
                return ResolvedBase(RecipeStatus.RECIPE)
            return NO_RECIPE_BASE if self._is_recipe_free_call(node, module) else UNKNOWN_BASE
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
                stars = [star for star in module.star_imports if self._may_bind(star, name)]
                found = [self.resolve_module(star, [name, *attributes]) for star in stars]
                if hasattr(builtins, name):
                    found = [base for base in found if base.status == RecipeStatus.RECIPE]
                elif name in module.set_anywhere or (module.is_installed and not stars):
                    found.append(UNKNOWN_BASE)
            return strongest_base(found)
        finally:
            self.resolving.remove(key)

    def _may_bind(self, name: str, attribute: str) -> bool:
        """Return whether a star import of a module may bind a name."""
        module = self._load_module(name)
        if module is None or module.star_imports or "__getattr__" in module.names:
            return True
        return attribute in {*module.names, *module.imports, *module.declared_global, *module.set_anywhere}

    def _resolve_bound(self, node: ast.AST, attributes: list[str], module: ModuleNames) -> ResolvedBase:
        if not attributes:
            return self.resolve_expression(node, module)
        if isinstance(node, ast.ClassDef):  # a class in a class
            return self.resolve_name(attributes[0], attributes[1:], self.collect_inner_names(node, module))
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
        if parts[-1] in ("Recipe", "DatasetRecipe"):
            return ResolvedBase(RecipeStatus.RECIPE, parts[1] if parts[1] in FRAMEWORK_NAMES else "")
        if parts[1] == "recipes" and len(parts) == 4 and (SHIPPED_RECIPES / f"{parts[2]}.py").is_file():
            return NameResolver(SHIPPED_RECIPES).resolve_module(parts[2], parts[3:])
        return NO_RECIPE_BASE

    def _is_namespace_folder(self, name: str) -> bool:
        """Return whether a module is a folder without __init__.py, next to the recipe."""
        return is_own_module(self.root, name.partition(".")[0]) and self.root.joinpath(*name.split(".")).is_dir()

    def _load_module(self, name: str) -> ModuleNames | None:
        """Return the names of a module of the script's own folder, or else of an installed one; None without source."""
        if name not in self.modules:
            self.modules[name] = None
            own = find_module_files(self.root, name) if is_own_module(self.root, name.partition(".")[0]) else []
            for file in own or find_installed_files(name):
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                try:
                    module = self.collect_names(parse_file(file, file.read_bytes()), package)
                except (OSError, UserError):
                    continue
                module.is_installed = not own
                self.modules[name] = module
        return self.modules[name]

    def _is_own_call(self, node: ast.Call, module: ModuleNames, name: str) -> bool:
        """Return whether a function of hvdtrain's, by its name, is called."""
        chain = dotted_parts(node.func) or [""]
        full = [[*source.split("."), imported, *chain[1:]] for source, imported in module.imports.get(chain[0], [])]
        return any(parts[0] == OWN_PACKAGE and parts[-1] == name for parts in full)

    def _is_recipe_free_call(self, node: ast.Call, module: ModuleNames) -> bool:
        """Return whether a function that is called is one of a package without recipes, and is given no recipe."""
        chain = dotted_parts(node.func)
        if chain is None or chain[0] in module.names or chain[0] in module.declared_global:
            return False
        sources = [source for source, _ in module.imports.get(chain[0], [])]
        if not sources or not all(is_recipe_free(source.partition(".")[0]) for source in sources):
            return False
        given = [part for value in (*node.args, *node.keywords) for part in ast.walk(value)]
        given = [part for part in given if isinstance(part, (ast.Name, ast.Attribute))]
        return all(self.resolve_expression(part, module).status != RecipeStatus.RECIPE for part in given)


def find_module_files(root: Path, name: str) -> list[Path]:
    """Return the file of a module, by its name, below the folder of its top-level module."""
    top, _, rest = name.partition(".")
    if rest and (root / f"{top}.py").is_file():
        return []
    path = root.joinpath(*name.split("."))
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


def find_installed_files(name: str) -> list[Path]:
    """Return the file of an installed module; none of a package without recipes, which need not be read."""
    top = name.partition(".")[0]
    if not top or is_recipe_free(top):
        return []
    try:
        spec = importlib.util.find_spec(top)  # which imports nothing
    except (ImportError, ValueError):
        return []
    places = list(spec.submodule_search_locations or []) if spec else []
    places = places or ([spec.origin] if spec and spec.origin else [])
    return [file for place in places for file in find_module_files(Path(place).parent, name)]


def is_recipe_free(top: str) -> bool:
    """Return whether a package, by its name, is known to have no recipe in it."""
    return top in sys.stdlib_module_names or top in RECIPE_FREE_PACKAGES


def strongest_base(bases: Iterable[ResolvedBase]) -> ResolvedBase:
    return max(bases, key=lambda base: base.status, default=NO_RECIPE_BASE)
