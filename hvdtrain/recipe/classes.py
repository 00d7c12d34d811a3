"""Which classes of a file can be recipes, by its syntax alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from hvdtrain.recipe.base_classes import ModuleNames, NameResolver, RecipeStatus
from hvdtrain.recipe.source import RecipeSource, parse_file
from hvdtrain.recipe.syntax import iterate_top_level


@dataclass(frozen=True)
class CandidateClass:
    """A class that is or may be a recipe."""

    name: str
    status: RecipeStatus
    framework: str  # of the Recipe that it leads to; "" if that is unknown
    summary: str  # first line of its docstring
    domain: str  # as it or a base declares it; "" if none does

    def describe_doubt(self) -> str:
        """Return `is` or `may be`, whichever holds for its being a recipe."""
        return "is" if self.status == RecipeStatus.RECIPE else "may be"


def read_classes(source: RecipeSource) -> list[CandidateClass]:
    """Return the classes at the top level of a recipe's file that are recipes or may be, in their order.

    Raises UserError if the file does not parse.
    """
    return [cls for cls in read_all_classes(source) if "." not in cls.name]


def read_all_classes(source: RecipeSource) -> list[CandidateClass]:
    """Return the classes that are recipes or may be, wherever in the file; those in a function `f` are `f.Name`.

    Raises UserError if the file does not parse.
    """
    resolver = NameResolver(source.root)
    tree = parse_file(source.display_path, source.files[source.main])
    module = resolver.collect_names(tree, source.module.rpartition(".")[0])
    found = {}
    for name, node, names in iterate_classes(resolver, tree.body, module, ""):
        base = resolver.resolve_class(node, names)
        if base.status > RecipeStatus.NOT_RECIPE:
            summary = (ast.get_docstring(node) or "").partition("\n")[0]
            found[name] = CandidateClass(name, base.status, base.framework, summary, base.domain)
    return list(found.values())


def iterate_classes(
    resolver: NameResolver, body: list[ast.stmt], names: ModuleNames, prefix: str
) -> Iterator[tuple[str, ast.ClassDef, ModuleNames]]:
    """Yield the classes in some statements, and in the functions and classes there: name, class, names that it sees."""
    for node in iterate_top_level(body):
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node, names
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and has_inner_class(node):
            inner = resolver.collect_inner_names(node, names)
            yield from iterate_classes(resolver, node.body, inner, f"{prefix}{node.name}.")


def has_inner_class(node: ast.stmt) -> bool:
    """Return whether a class is defined anywhere in a class or function."""
    return any(isinstance(inner, ast.ClassDef) and inner is not node for inner in ast.walk(node))
