"""Recipes by name or by path: listing them without importing them, and loading one."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.recipe.base import FRAMEWORK_RECIPES, Recipe
from hvdtrain.recipe.base_classes import RecipeStatus
from hvdtrain.recipe.classes import read_classes
from hvdtrain.recipe.source import SHIPPED_RECIPES, RecipeSource, import_source, read_source
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.text import join_alternatives


@dataclass(frozen=True)
class FoundRecipe:
    """A recipe class seen in a file."""

    name: str  # what the command line takes: "digits" or "digits:Wide"
    framework: str
    summary: str  # first line of its docstring
    domain: str  # the field that it is of; "" if it names none
    path: Path
    class_name: str


def recipe_folders() -> list[Path]:
    """Return where a name is looked for: ./recipes, then the recipes that hvdtrain ships."""
    here = Path("recipes").absolute()
    return (
        [here, SHIPPED_RECIPES] if here.is_dir() and here.resolve() != SHIPPED_RECIPES.resolve() else [SHIPPED_RECIPES]
    )


def find_all_recipes() -> list[FoundRecipe]:
    """Return every recipe in `recipe_folders()`, by the files' syntax only; the first folder wins a name."""
    found: dict[str, FoundRecipe] = {}
    for folder in recipe_folders():
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                for recipe in find_recipes_in_file(path):
                    found.setdefault(recipe.name, recipe)
    return sorted(found.values(), key=lambda recipe: recipe.name)


def find_recipes_in_file(path: Path, name: str = "") -> list[FoundRecipe]:
    """Return the recipe classes in a file, without running it; none if it cannot be read or does not parse.

    Args:
        path: of the file.
        name: what the command line takes for it; "" for the file's name without .py.
    """
    try:
        source = read_source(path)
        seen = read_classes(source)
    except UserError:
        return []
    recipes = [cls for cls in seen if cls.status == RecipeStatus.RECIPE]
    default, stem = choose_default_class(path, [cls.name for cls in recipes]), name or path.stem
    found = []
    for cls in recipes:
        full = stem if cls.name == default else f"{stem}:{cls.name}"
        found.append(FoundRecipe(full, cls.framework, cls.summary, cls.domain, path, cls.name))
    return found


def describe_program(path: Path) -> str:
    """Return the message that a file has no recipe."""
    return (
        f"{path} defines no recipe, and was not run: subclass {join_alternatives(FRAMEWORK_RECIPES)}, or start it as a "
        f"program: hvdtrain launch {shlex.quote(str(path))}"
    )


def find_named_recipes(spec: str) -> list[FoundRecipe]:
    """Return the recipes of RECIPE: a name, a path, or one of these with a class. Raises UserError if it has none."""
    where, class_name = split_recipe_spec(spec)
    path = find_recipe_source(spec).display_path
    found = [recipe for recipe in find_recipes_in_file(path, where) if class_name in ("", recipe.class_name)]
    if not found:
        raise UserError(f"{path} has no recipe class {class_name!r}" if class_name else describe_program(path))
    return found


def choose_default_class(path: Path, names: list[str]) -> str | None:
    """Return the class that a path alone means: the only one, or the one named as the file is."""
    if len(names) == 1:
        return names[0]
    stem = path.stem.replace("_", "").replace("-", "").lower()
    return next((name for name in names if name.lower() == stem), None)


def split_recipe_spec(spec: str) -> tuple[str, str]:
    """Return RECIPE as a name or path, and the class named after its last colon: "" if there is none.

    A path may have colons of its own: what follows the last one is a class only if the path does not exist as it is.
    """
    where, colon, class_name = spec.rpartition(":")
    return (where, class_name) if colon and class_name.isidentifier() and not Path(spec).is_file() else (spec, "")


def find_recipe_source(spec: str) -> RecipeSource:
    """Read the source of `digits`, `my/recipe.py` or one of these with `:ClassName`, without running it.

    Raises UserError if there is no such file, or it does not parse.
    """
    where, _ = split_recipe_spec(spec)
    path = Path(where)
    if path.suffix != ".py" and path.name == where:
        path = _find_by_name(where)
    if not path.is_file():
        raise UserError(f"no recipe file {where!r}")
    if path.suffix != ".py":
        raise UserError(f"{path} is not a Python file: the name of a recipe's file ends in .py")
    return read_source(path)


def load_recipe(spec: str, source: RecipeSource | None = None, backend: str | None = None) -> type[Recipe]:
    """Import the recipe class for `digits`, `digits:Wide`, `my/recipe.py` or `my/recipe.py:ClassName`.

    A file without a class that could be a recipe is not run.

    Args:
        spec: RECIPE.
        source: what to import; None: the file that `spec` names.
        backend: as the option --backend, which frameworks must know before they are imported.

    Raises:
        UserError: there is no such file or class, with the nearest one; or the import fails.
    """
    from hvdtrain.recipe.before_import import prepare_imports  # with which torch comes

    source = source or find_recipe_source(spec)
    where, class_name = split_recipe_spec(spec)
    path = source.display_path
    seen = read_classes(source)
    possible = [cls.name for cls in seen]
    if not possible:
        raise UserError(describe_program(path))
    if class_name and class_name not in possible:
        raise UserError(f"{path} has no recipe class {class_name!r}{suggest_nearest(class_name, possible)}")
    prepare_imports((cls.framework for cls in seen if class_name in ("", cls.name)), backend)
    module = import_source(source)
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == source.module
    }
    if class_name:
        if class_name not in classes:
            raise UserError(f"{path} has no recipe class {class_name!r}{suggest_nearest(class_name, classes)}")
        return classes[class_name]
    default = choose_default_class(path, list(classes))
    if default is None:
        if not classes:
            raise UserError(f"{path} defines no recipe: subclass {join_alternatives(FRAMEWORK_RECIPES)}")
        raise UserError(f"{path} defines several recipes: name one, {' or '.join(f'{where}:{n}' for n in classes)}")
    return classes[default]


def _find_by_name(name: str) -> Path:
    for folder in recipe_folders():
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise UserError(f"no recipe {name!r}{suggest_nearest(name, {recipe.path.stem for recipe in find_all_recipes()})}")
