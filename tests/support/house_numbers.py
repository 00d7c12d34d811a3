"""Numbers that say how hard the code is to read: `python -m tests.support.house_numbers [FOLDER]`."""

from __future__ import annotations

import argparse
import ast
import collections
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hvdtrain"
HOROVODS = {"DistributedOptimizer"}  # with the parameters of Horovod's function of that name, and our own
UNTYPED = {"dict", "Dict", "Mapping", "MutableMapping"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class HouseNumbers:
    """Of all files of a package. Names count without leading underscores, and without dunders."""

    files: int
    lines: int
    functions: int
    median_lines: float  # of a function
    longest: tuple[int, str]  # lines, and where
    most_parameters: tuple[int, str]  # without self and cls; no click command, whose parameters are its options
    docstring_percent: float
    untyped_dicts: list[str]  # places of `dict[str, Any]` and `Mapping[str, Any]`
    name_letters: float  # mean
    one_word_percent: float
    defined_twice: dict[str, list[str]]  # functions and classes of a module's top level, by name

    def format_lines(self) -> list[str]:
        """Return the numbers as text, a line each."""
        per_thousand = 1000 * len(self.untyped_dicts) / self.lines
        return [
            f"files              {self.files}, {self.lines} lines, {self.lines / self.files:.0f} a file",
            f"functions          {self.functions}, median {self.median_lines:g} lines, {self.docstring_percent:.0f} % "
            "with a docstring",
            f"longest function   {self.longest[0]} lines, {self.longest[1]}",
            f"most parameters    {self.most_parameters[0]}, {self.most_parameters[1]}",
            f"untyped dicts      {len(self.untyped_dicts)}, {per_thousand:.1f} per 1,000 lines",
            f"names              {self.name_letters:.1f} letters, {self.one_word_percent:.0f} % one word",
            f"defined twice      {len(self.defined_twice)}: {', '.join(self.defined_twice)}",
        ]


def measure(package: Path = PACKAGE) -> HouseNumbers:
    """Read all Python files of a package."""
    files = sorted(package.rglob("*.py"))
    functions: list[tuple[Path, Function]] = []
    untyped: list[str] = []
    places: dict[str, list[str]] = collections.defaultdict(list)
    for path in files:
        tree = ast.parse(path.read_text())
        functions += [(path, node) for node in ast.walk(tree) if isinstance(node, Function)]
        untyped += [f"{path}:{node.lineno}" for node in ast.walk(tree) if is_untyped_dict(node)]
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef):
                places[node.name].append(str(path))
    named = [(path, node) for path, node in functions if not node.name.startswith("__")]
    names = [node.name.strip("_") for _, node in named]
    return HouseNumbers(
        files=len(files),
        lines=sum(len(path.read_text().splitlines()) for path in files),
        functions=len(functions),
        median_lines=statistics.median(count_lines(node) for _, node in functions),
        longest=max((count_lines(node), f"{path}:{node.lineno} {node.name}") for path, node in functions),
        most_parameters=max(
            (count_parameters(node), f"{path}:{node.lineno} {node.name}")
            for path, node in functions
            if not is_click_command(node) and node.name not in HOROVODS
        ),
        docstring_percent=100 * statistics.mean(ast.get_docstring(node) is not None for _, node in functions),
        untyped_dicts=untyped,
        name_letters=statistics.mean(map(len, names)),
        one_word_percent=100 * statistics.mean("_" not in name for name in names),
        defined_twice={name: where for name, where in sorted(places.items()) if len(where) > 1 and name != "main"},
    )


def is_untyped_dict(node: ast.AST) -> bool:
    """Whether a node is `dict[str, Any]`, `Mapping[str, Any]` or the like."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
        return False
    arguments = [part.id for part in node.slice.elts if isinstance(part, ast.Name)]
    return isinstance(node.value, ast.Name) and node.value.id in UNTYPED and arguments == ["str", "Any"]


def count_lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def count_parameters(node: Function) -> int:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def is_click_command(node: Function) -> bool:
    """Whether a function is decorated by click, which gives it a parameter for each option."""
    return any("click" in part or part.endswith("_command.command") for part in decorators(node))


def decorators(node: Function) -> Iterator[str]:
    for decorator in node.decorator_list:
        yield ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=PACKAGE)
    print("\n".join(measure(parser.parse_args().folder).format_lines()))
