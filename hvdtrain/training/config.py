"""The options of a run as config.json keeps them: for --resume, --config and `hvdtrain.load`.

    {"name": "digits", "class": "Digits", "framework": "torch", "source": {"main": "digits.py", "root": "/home/me"},
     "recipe": {"width": 32, "adam": {"beta": 0.9}, ...},      those of the recipe, nested as its dataclasses are
     "run": {"seed": 0, "amp": "off", ...}}                    those of every run

An earlier hvdtrain wrote {"recipe": "digits", "options": {...}}, which is read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import OptionField, OptionValues, convert_value, flatten_options, option_fields
from hvdtrain.recipe.source import source_of_class
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.records import parse_record
from hvdtrain.system.strict_json import JsonObject, parse_strict_json
from hvdtrain.training.options import RunOptions

# Where a run is, not what it is.
EXCLUDED_FROM_CONFIG = ("run_dir", "resume")
TABLES = ("recipe", "run")
RECIPE_KEYS = ("name", "class", "framework", "source")
# One of two options that exclude each other: given now, it also replaces the other one in a file.
REPLACED_OPTIONS = (("epochs", "steps"), ("batch_size", "batch_per_rank"), ("batch_size", "scale_lr"))


def build_config(name: str, recipe: Recipe, options: RunOptions) -> Mapping[str, object]:
    """Return what config.json holds."""
    source = source_of_class(type(recipe))
    kept = {name: value for name, value in flatten_options(options).items() if name not in EXCLUDED_FROM_CONFIG}
    return {
        "name": name,
        "class": type(recipe).__qualname__,
        "framework": recipe.framework,
        "source": {"main": source.main, "root": str(source.root)} if source is not None else None,
        "recipe": nest_values(flatten_options(recipe)),
        "run": nest_values(kept),
    }


def nest_values(values: OptionValues) -> dict[str, object]:
    """Return values for JSON, those with a dot in their name in objects of their own."""
    nested: JsonObject = {}
    for name, value in values.items():
        *outer, last = name.split(".")
        table = nested
        for part in outer:
            table = table.setdefault(part, {})
        several = isinstance(value, (tuple, list))
        table[last] = [encode_value(one) for one in value] if several else encode_value(value)
    return nested


def encode_value(value: object) -> object:
    """Return one value for JSON."""
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class RunConfig:
    """What a run folder's config.json holds."""

    name: str  # of the recipe, in the run folder
    class_name: str | None  # None: an earlier hvdtrain, which did not write it
    source: dict[str, str] | None  # the recipe's file, relative to its root, and the root
    content: JsonObject


def read_config(run_dir: Path) -> RunConfig | None:
    """Return a run folder's config.json; None if there is no such file. Raises UserError if it cannot be read."""
    path = run_dir / "config.json"
    if not path.exists():
        return None
    try:
        saved = parse_strict_json(path.read_bytes())
        if not isinstance(saved, dict):
            raise TypeError(f"it holds {type(saved).__name__}; expected an object")
        if not isinstance(saved.get("recipe"), dict):
            content = {"recipe": saved["recipe"], "options": saved["options"]}
            return _parse_config(saved["recipe"], None, None, content)
        for key in TABLES:
            if not isinstance(saved[key], dict):
                raise TypeError(f"{key!r} is not an object")
        return _parse_config(saved["name"], saved["class"], saved["source"], saved)
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} cannot be read: {what}") from error


def _parse_config(name: Any, class_name: Any, source: Any, content: Any) -> RunConfig:
    """Return what config.json holds. Raises ValueError for a value of another type."""
    values = {"name": name, "class_name": class_name, "source": source, "content": content}
    config: RunConfig = parse_record(values, RunConfig)
    return config


@dataclass(frozen=True)
class ConfigReader:
    """Reads the options of a file for a recipe.

    Attributes:
        path: the file, for messages.
        cls: the recipe's class.
        remedy: what to do about an option that there is none of; "" or with a colon before it.
    """

    path: Path
    cls: type[Recipe]
    remedy: str = ""

    def read_options(self, content: Any) -> OptionValues:
        """Return options by their flat names, of a file with tables, a flat one, or an earlier config.json.

        Raises UserError for an unknown option, with the nearest, and for a value that it cannot have.
        """
        recipe = {field.name: field for field in option_fields(self.cls)}
        run = {field.name: field for field in option_fields(RunOptions)}
        if not isinstance(content, dict):
            raise UserError(f"{self.path} holds {type(content).__name__}; expected options by their names")
        if isinstance(content.get("recipe"), str) and isinstance(content.get("options"), dict):
            return self.read_table(content["options"], recipe | run)
        if not any(isinstance(content.get(table), dict) for table in TABLES):
            values = self.read_table(content, recipe | run)
            for one, other in REPLACED_OPTIONS[:2]:
                if values.get(one) is not None and values.get(other) is not None:
                    raise UserError(f"{self.path}: {one} and {other} exclude each other: give one")
            return values
        for key in content:
            if key not in (*TABLES, *RECIPE_KEYS):
                tables = [name for name, own in zip(TABLES, (recipe, run), strict=True) if key in own]
                where = f"; it belongs in {tables[0]}" if tables else suggest_nearest(key, TABLES)
                raise UserError(f"{self.path} has {key!r} next to the options of recipe and run{where}")
        values = {}
        for table, own, elsewhere in ((TABLES[0], recipe, run), (TABLES[1], run, recipe)):
            inner = content.get(table, {})
            if not isinstance(inner, dict):
                raise UserError(f"{self.path}: {table} is {inner!r}; expected options by their names")
            for name in inner:
                if name in elsewhere and name not in own:
                    right = TABLES[1 - TABLES.index(table)]
                    raise UserError(f"{self.path}: {name} belongs in {right}, not in {table}")
            values.update(self.read_table(inner, own))
        return values

    def read_table(self, table: JsonObject, known: Mapping[str, OptionField], prefix: str = "") -> OptionValues:
        """Return the options of an object, those of the objects in it included."""
        values: dict[str, object] = {}
        for key, value in table.items():
            name = f"{prefix}{key}"
            if name in known:
                try:
                    convert_value(known[name], value)
                except UserError as error:
                    raise UserError(f"{self.path}: {error}") from error
                values[name] = value
            elif isinstance(value, dict) and any(other.startswith(f"{name}.") for other in known):
                values.update(self.read_table(value, known, f"{name}."))
            else:
                near = suggest_nearest(name, known, list_all=False)
                text = f"{self.path} has the option {name!r}, which {self.cls.__name__} does not have"
                raise UserError(f"{text}{self.remedy}{near}")
        return values


def override_options(earlier: OptionValues, given: OptionValues) -> OptionValues:
    """Return options of a file, overridden by those given now."""
    replaced = {other for option, other in REPLACED_OPTIONS if given.get(option) is not None}
    return {**{name: value for name, value in earlier.items() if name not in replaced}, **given}


def read_saved_options(run_dir: Path, cls: type[Recipe], name: str) -> OptionValues:
    """Return the options in a run folder's config.json; none if there is no such file. Raises UserError."""
    config = read_config(run_dir)
    if config is None:
        return {}
    if config.name != name:
        raise UserError(f"{run_dir} is a run of recipe {config.name!r}, not of {name!r}")
    remedy = ": rename or remove it there as in the recipe"
    return ConfigReader(run_dir / "config.json", cls, remedy).read_options(config.content)
