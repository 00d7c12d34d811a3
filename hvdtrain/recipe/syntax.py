"""Parts of Python's syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator


def list_parameters(args: ast.arguments) -> list[ast.arg]:
    """Return all parameters of a function."""
    several = [one for one in (args.vararg, args.kwarg) if one is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *several]


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
