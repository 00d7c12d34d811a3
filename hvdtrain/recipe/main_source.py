"""The source of a recipe's class that is defined in a notebook's cells or in a running script, as a file of its own.

    class in __main__  --> its text, and the names that it and its methods look up in __main__
         each name     --> a function or class of __main__: its text, and its names likewise
                           a module, or what one has: an import
                           a plain value (numbers, texts, lists of them): as it is now
                           anything else: the one statement that makes it, if nothing changes it later

What is none of these is refused by name. Nothing is executed here, and of the script or the cells nothing else will be.
"""

from __future__ import annotations
import __future__

import ast
import dis
import importlib
import linecache
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from hvdtrain.recipe.source import RecipeSource
from hvdtrain.system.errors import UserError

MAIN = "__main__"
PYTHON_FOLDERS = (sys.prefix, sys.base_prefix)  # what begins the entries of sys.path that every rank has
MAX_VALUE_CHARACTERS = 100_000  # of a plain value that is written


def write_main_class(cls: type) -> str:
    """Return the text of a file that defines a class of __main__ as it is there.

    Raises:
        UserError: its source, or that of something that it uses, cannot be had.
    """
    return MainSource(cls).build_text()


def make_main_source(cls: type, folder: Path) -> RecipeSource:
    """Return the source of a class of __main__ as if it were a file of a folder. Raises UserError."""
    name = f"{cls.__name__.lower()}.py"
    text = write_main_class(cls).encode()
    return RecipeSource(folder, name, f"hvdtrain_recipe_{Path(name).stem}", False, {name: text}, folder / name)


class MainSource:
    """Collects what a class of __main__ needs."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.namespace = vars(sys.modules[MAIN])
        self.trees = list(parse_executed_texts(self.namespace))
        self._statements: dict[str, None] = {}  # texts, each after those that it needs
        self._imports: dict[str, None] = {}  # lines
        self._seen: set[str] = set()  # names that are defined by them, or will be
        self._defers_annotations = False

    def build_text(self) -> str:
        """Return the whole file. Raises UserError."""
        name = self.cls.__name__
        if "." in self.cls.__qualname__:
            raise UserError(
                f"recipe {self.cls.__qualname__} is defined in a function or class, where ranks cannot find it: define "
                "it at the top of a cell or file"
            )
        if self.namespace.get(name) is not self.cls:
            raise UserError(f"the recipe's class {name} was defined again since it was made: make the recipe again")
        self.add_name(name, user=name)
        future = ["from __future__ import annotations"] if self._defers_annotations else []
        # What the script or notebook imports is found as it was there, also files that are next to it.
        own = [entry for entry in sys.path if Path(entry).is_dir() and entry and not entry.startswith(PYTHON_FOLDERS)]
        path = f"sys.path.extend(entry for entry in {own!r} if entry not in sys.path)"
        head = [f'"""Written by hvdtrain.fit: the recipe {name} as it was in __main__, and what it uses."""']
        lines = [*head, *future, "import sys", path, *self._imports]
        return "\n".join(lines) + "\n\n\n" + "\n\n\n".join(self._statements) + "\n"

    def add_name(self, name: str, user: str) -> None:
        """Add what defines a name of __main__, unless it is there. user: the definition that needs it."""
        if name in self._seen:
            return
        self._seen.add(name)
        value = self.namespace[name]
        if name == "__file__":
            self._statements[f"__file__ = {str(Path(value).absolute())!r}"] = None
        elif (line := self._find_import(name, value)) is not None:
            self._imports[line] = None
        elif (getattr(value, "__module__", None), getattr(value, "__name__", None)) == (MAIN, name):
            node, text = self._find_definition(name, value)
            self._add_needed(node, name)
            self._statements[text] = None
        elif (literal := write_value(value)) is not None:
            self._statements[f"{name} = {literal}"] = None
        else:
            self._add_statement(name, value, user)

    def _add_needed(self, node: ast.stmt, user: str) -> None:
        """Add the names of __main__ that a statement, and all that is defined in it, looks up."""
        for chain in attribute_chains(node):
            self._import_submodules(chain)
        for name in global_names(node):
            if name in self.namespace and not (name.startswith("__") and name != "__file__"):
                self.add_name(name, user)

    def _import_submodules(self, chain: list[str]) -> None:
        """Import the modules that `package.module.name` goes through, which another import may have loaded here."""
        value = self.namespace.get(chain[0])
        for part in chain[1:]:
            module = f"{value.__name__}.{part}" if isinstance(value, ModuleType) else ""
            if module not in sys.modules or getattr(value, part, None) is not sys.modules[module]:
                return
            self._imports[f"import {module}"] = None
            value = sys.modules[module]

    def _find_import(self, name: str, value: object) -> str | None:
        """Return the line that imports a value under a name; None if it is of __main__ itself."""
        if isinstance(value, ModuleType) and value.__name__ != MAIN:
            return f"import {value.__name__}" + (f" as {name}" if value.__name__ != name else "")
        for tree in reversed(self.trees):
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    for alias in node.names:
                        attribute = name if alias.name == "*" else alias.name
                        if name == (alias.asname or attribute) and is_value_of(value, node.module, attribute):
                            return write_import(node.module, attribute, name)
        module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(module, str) and isinstance(qualname, str) and module != MAIN:
            return write_import(module, qualname, name) if is_value_of(value, module, qualname) else None
        return None

    def _find_definition(self, name: str, value: object) -> tuple[ast.stmt, str]:
        """Return the statement that has defined a function or class, and its text. Raises UserError."""
        for code in find_codes(value):
            lines = linecache.getlines(code.co_filename)
            self._defers_annotations |= bool(code.co_flags & __future__.annotations.compiler_flag)
            if found := find_statement(parse_or_none("".join(lines)), name):
                return found, cut_text(lines, found)
        if isinstance(value, type) and not any(find_codes(value)):  # a class without methods
            for tree in reversed(self.trees):
                if found := find_statement(tree, name):
                    return found, ast.unparse(found)
        kind = "class" if isinstance(value, type) else "function"
        raise UserError(
            f"the source of the {kind} {name} cannot be had: define it in a file or a notebook's cell, not by exec() "
            "or at Python's prompt"
        )

    def _add_statement(self, name: str, value: object, user: str) -> None:
        """Add the only statement that binds a name, with what it needs. Raises UserError."""
        bound = [node for tree in self.trees for node in tree.body if name in assigned_names(node)]
        texts = {ast.unparse(node) for node in bound}
        if len(texts) != 1 or any(changes_name(node, name) for tree in self.trees for node in ast.walk(tree)):
            kind = type(value).__name__
            raise UserError(
                f"{user} uses {name}, a value of type {kind} in __main__ that cannot be written to a file for the "
                f"ranks: make it in a method of {self.cls.__name__}, or in one assignment that nothing changes later, "
                "or import it"
            )
        self._add_needed(bound[-1], name)
        self._statements[ast.unparse(bound[-1])] = None


def parse_executed_texts(namespace: Mapping[str, object]) -> Iterator[ast.Module]:
    """Yield the syntax trees of what was executed in __main__: the cells in their order, or the script."""
    cells, file = namespace.get("In"), namespace.get("__file__")
    if isinstance(cells, list):
        texts = [cell for cell in cells if isinstance(cell, str)]
    else:
        texts = ["".join(linecache.getlines(file))] if isinstance(file, str) else []
    for text in texts:
        if (tree := parse_or_none(text)) is not None:
            yield tree


def parse_or_none(text: str) -> ast.Module | None:
    """Return the syntax tree of a text; None if it has none."""
    try:
        return ast.parse(text) if text else None
    except (SyntaxError, ValueError):
        return None


def find_codes(value: object) -> Iterator[CodeType]:
    """Yield the code of a function, or of a class's own methods, that the running script or a cell has."""
    script = getattr(sys.modules[MAIN], "__file__", None)
    members = vars(value).values() if isinstance(value, type) else [value]
    for member in members:
        for inner in (member, *(getattr(member, name, None) for name in ("__func__", "fget", "__wrapped__"))):
            code = getattr(inner, "__code__", None)
            if not isinstance(code, CodeType) or getattr(inner, "__module__", None) != MAIN:
                continue
            # Not of a wrapper around it, which is of another file, nor what a dataclass has generated.
            file = code.co_filename
            if file == script or not (file == "<string>" or Path(file).exists()):
                yield code


def find_statement(tree: ast.Module | None, name: str) -> ast.stmt | None:
    """Return the last definition of a function or class of that name at the top of a text, also within an `if`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    waiting: list[ast.AST] = [tree] if tree is not None else []
    found: ast.stmt | None = None
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop(0)):
            if isinstance(node, kinds) and node.name == name:
                found = node
            if not isinstance(node, nested):
                waiting.append(node)
    return found


def cut_text(lines: list[str], node: ast.stmt) -> str:
    """Return the lines of a statement, its decorators' included."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip()


def global_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a file, and all code in it, looks up there; with annotations."""
    found: dict[str, None] = {}
    waiting = [compile(ast.Module([node], []), "<names>", "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        waiting += [each for each in code.co_consts if isinstance(each, CodeType)]
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                found[str(step.argval)] = None
    for inner in ast.walk(node):
        for annotation in (getattr(inner, "annotation", None), getattr(inner, "returns", None)):
            names = ast.walk(annotation) if isinstance(annotation, ast.AST) else ()
            found |= {each.id: None for each in names if isinstance(each, ast.Name)}
    return list(found)


def attribute_chains(node: ast.AST) -> Iterator[list[str]]:
    """Yield the dotted names in a statement: ["torch", "nn", "Linear"]."""
    for inner in ast.walk(node):
        parts: list[str] = []
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            yield [inner.id, *parts]


def assigned_names(node: ast.AST) -> list[str]:
    """Return the names that an assignment binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    inner = [each for target in targets for each in ast.walk(target)]
    return [each.id for each in inner if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]


def changes_name(node: ast.AST, name: str) -> bool:
    """Return whether a statement may change what a name stands for: in place, or by a call of one of its methods."""
    if isinstance(node, ast.Global):
        return name in node.names
    if isinstance(node, (ast.For, ast.AugAssign)) and isinstance(node.target, ast.Name) and node.target.id == name:
        return True
    changed: ast.AST | None = None
    if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
        changed = node
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        changed = node.value.func
    while isinstance(changed, (ast.Attribute, ast.Subscript)):
        changed = changed.value
    return isinstance(changed, ast.Name) and changed.id == name


def write_value(value: object) -> str | None:
    """Return a plain value as Python's text; None for any other, and for a long one."""
    if isinstance(value, Path):
        return f'__import__("pathlib").Path({str(value)!r})'
    if not isinstance(value, (bool, int, float, complex, str, bytes, tuple, list, dict, set, type(None))):
        return None
    try:
        text = repr(value)
        return text if len(text) <= MAX_VALUE_CHARACTERS and ast.literal_eval(text) == value else None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def is_value_of(value: object, module: str, qualname: str) -> bool:
    """Return whether a module that is imported has this value under a name."""
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return found is value


def write_import(module: str, qualname: str, name: str) -> str:
    """Return the line that imports something as a name."""
    first, *rest = qualname.split(".")
    if rest:
        return f"import {module}; {name} = {module}.{qualname}"
    return f"from {module} import {first}" + (f" as {name}" if first != name else "")
