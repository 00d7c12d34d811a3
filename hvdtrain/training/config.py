"""The options of a run as config.json keeps them, for --resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hvdtrain.comm import collectives
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import OptionValues, convert_value, flatten_options, option_fields
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.strict_json import parse_strict_json
from hvdtrain.training.options import RunOptions

# Where a run is, not what it is.
EXCLUDED_FROM_CONFIG = ("run_dir", "resume")


def build_config(name: str, recipe: Recipe, options: RunOptions) -> Mapping[str, object]:
    """Return what config.json holds."""
    kept = {name: value for name, value in flatten_options(options).items() if name not in EXCLUDED_FROM_CONFIG}
    values = {**flatten_options(recipe), **kept}
    return {"recipe": name, "options": {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}}


def merge_saved_options(run_dir: Path, cls: type[Recipe], name: str, given: OptionValues) -> OptionValues:
    """Return the options of rank 0's config.json, overridden by those given now; the same on every rank.

    Raises UserError if the file is of another recipe or cannot be read. A folder without one is a run that never began.
    """
    options = dict(collectives.on_root("config", lambda: read_saved_options(run_dir, cls, name)))
    for option, other in (("epochs", "steps"), ("batch_size", "batch_per_rank"), ("batch_size", "scale_lr")):
        if option in given:
            options.pop(other, None)
    return {**options, **given}


def read_saved_options(run_dir: Path, cls: type[Recipe], name: str) -> OptionValues:
    """Return the options in a run folder's config.json; none if there is no such file. Raises UserError."""
    path = run_dir / "config.json"
    if not path.exists():
        return {}
    try:
        saved = parse_strict_json(path.read_bytes())
        recipe, options = saved["recipe"], dict(saved["options"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if recipe != name:
        raise UserError(f"{run_dir} is a run of recipe {recipe!r}, not of {name!r}")
    known = {field.name: field for field in [*option_fields(cls), *option_fields(RunOptions)]}
    for option, value in options.items():
        if option not in known:
            near = suggest_nearest(option, [field.name for field in option_fields(cls)])
            text = f"{path} has the option {option!r}, which {cls.__name__} does not have"
            raise UserError(f"{text}: rename or remove it there as in the recipe{near}")
        try:
            convert_value(known[option], value)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return options
