"""Recipes by name or by path: listing them without importing them, and loading one."""

from __future__ import annotations

import ast
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import UserError, nearest
from hvdtrain.recipe import Recipe

SHIPPED = Path(__file__).parent / "recipes"
if not SHIPPED.is_dir():  # an editable install: the recipes lie beside the package
    SHIPPED = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Found:
    """A recipe class seen in a file."""

    name: str  # what the command line takes: "digits" or "digits:Wide"
    framework: str
    summary: str  # first line of its docstring
    path: Path


def folders() -> list[Path]:
    """Where a name is looked for: ./recipes, then the recipes that hvdtrain ships."""
    here = Path("recipes").absolute()
    return [here, SHIPPED] if here.is_dir() and here.resolve() != SHIPPED.resolve() else [SHIPPED]


def find_all() -> list[Found]:
    """Every recipe in `folders()`, by reading the files' syntax only; the first folder wins a name."""
    found: dict[str, Found] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                for recipe in read_classes(path):
                    found.setdefault(recipe.name, recipe)
    return sorted(found.values(), key=lambda recipe: recipe.name)


def read_classes(path: Path) -> list[Found]:
    """The recipe classes defined in a file, without running it. A file that does not parse has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    framework = ""
    known: dict[str, str] = {}  # class name: summary
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hvdtrain."):
            framework = node.module.split(".")[1]
        if isinstance(node, ast.ClassDef):
            bases = {base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases}
            if "Recipe" in bases or bases & set(known):
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                known[node.name] = summary
    default = default_class(path, list(known))
    return [
        Found(path.stem if name == default else f"{path.stem}:{name}", framework, summary, path)
        for name, summary in known.items()
    ]


def default_class(path: Path, names: list[str]) -> str | None:
    """The class that a path alone means: the only one, or the one named as the file is."""
    if len(names) == 1:
        return names[0]
    stem = path.stem.replace("_", "").replace("-", "").lower()
    return next((name for name in names if name.lower() == stem), None)


def load(spec: str) -> type[Recipe]:
    """The recipe class for `digits`, `digits:Wide`, `my/recipe.py` or `my/recipe.py:ClassName`.

    Raises UserError where there is none, saying the nearest.
    """
    where, _, class_name = spec.partition(":")
    path = Path(where)
    if path.suffix != ".py" and path.name == where:
        path = _by_name(where)
    if not path.is_file():
        raise UserError(f"no recipe file {where!r}")
    classes = _classes(path)
    if class_name:
        if class_name not in classes:
            raise UserError(f"{path} has no recipe class {class_name!r}{nearest(class_name, classes)}")
        return classes[class_name]
    default = default_class(path, list(classes))
    if default is None:
        if not classes:
            raise UserError(f"{path} defines no recipe: subclass hvdtrain.torch.Recipe")
        raise UserError(f"{path} defines several recipes: name one, {' or '.join(f'{where}:{n}' for n in classes)}")
    return classes[default]


def _by_name(name: str) -> Path:
    for folder in folders():
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise UserError(f"no recipe {name!r}{nearest(name, {recipe.path.stem for recipe in find_all()})}")


def _classes(path: Path) -> dict[str, type[Recipe]]:
    """Import the file and take the recipe classes that it defines itself, in their order."""
    module_name = f"hvdtrain_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.absolute())
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    # A recipe may import its neighbours, as a script may.
    if str(path.absolute().parent) not in sys.path:
        sys.path.append(str(path.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f"{path}:{lines[-1]}" if lines else f"{path}"
        raise UserError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == module_name
    }
