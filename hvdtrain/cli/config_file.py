"""`--config FILE` and `--print-config`: options from a file, and all options as such a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import OptionValues
from hvdtrain.system.errors import UserError
from hvdtrain.system.strict_json import parse_strict_json
from hvdtrain.training.config import ConfigReader, build_config, override_options, read_saved_options
from hvdtrain.training.options import split_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_SECTION = "Options from a file"


def make_config_options() -> list[click.Option]:
    """Return the options of every recipe that are about files of options."""
    return [
        click.Option(
            ["config", "--config"],
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="FILE",
            help="options from a .toml or .json file: in tables [recipe] and [run], or all at the top; also the "
            "config.json of a run. Options on the command line replace them, of several files the later ones",
        ),
        click.Option(
            ["print_config", "--print-config"], is_flag=True, help="print all options as JSON, for --config, and end"
        ),
    ]


def read_config_files(paths: Sequence[Path], cls: type[Recipe]) -> OptionValues:
    """Return the options of files, those of later ones over those of earlier ones.

    Raises:
        UserError: a file cannot be read, or has an unknown option or a wrong value.
    """
    values: OptionValues = {}
    for path in paths:
        values = override_options(values, ConfigReader(path, cls).read_options(parse_config_file(path)))
    return values


def parse_config_file(path: Path) -> Any:
    """Return what a .toml or .json file holds. Raises UserError if it cannot be read."""
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--config {path}: expected a file whose name ends in .toml or .json")
    try:
        data = path.read_bytes()
        return parse_strict_json(data) if path.suffix == ".json" else tomllib.loads(data.decode())
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of either format, or not UTF-8
        raise UserError(f"--config {path} cannot be read: {error}") from error


def format_config(cls: type[Recipe], name: str, given: OptionValues) -> str:
    """Return all options as JSON that `--config` reads, with defaults where none is given.

    With --resume, the run's own options come before the defaults. Raises UserError.
    """
    if given.get("resume") and given.get("run_dir"):
        given = override_options(read_saved_options(Path(given["run_dir"]), cls, name), given)
    recipe, options = split_options(cls, given)
    return json.dumps(build_config(name, recipe, options), indent=2)
