"""`hvdtrain.fit`: a recipe, a place in the world, and off."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World, init, shut_down_horovod
from hvdtrain.elastic.membership import Membership
from hvdtrain.recipe.base import Recipe, convert_value, make_from_values, option_fields
from hvdtrain.system import streams
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.strict_json import parse_strict_json
from hvdtrain.training.hang import watch_for_hangs
from hvdtrain.training.loop import train_recipe
from hvdtrain.training.options import RunOptions, check_elastic_options, check_recipe_values, split_options
from hvdtrain.training.start import agree_on_given_options, agree_on_options

# Where a run is, not what it is: these are not kept in config.json.
EXCLUDED_FROM_CONFIG = ("run_dir", "resume")


def fit(recipe: Recipe, comm: Any = None, **run_options: Any) -> dict[str, Any]:
    """Train a recipe on all ranks that run this, and return the summary (as in summary.json) on each.

    comm: an mpi4py communicator whose processes are the ranks; None: all that were launched.
    run_options: the run options of `hvdtrain train RECIPE --help`, e.g. run_dir="runs/x", resume=True, amp="bf16",
    epochs=3; those that a recipe has as fields (epochs, batch_size, lr, schedule) override it.
    Raises UserError (a ValueError's worth of user mistake) and RunError (the loss is not finite).
    """
    shared = {field.name for field in option_fields(Recipe)}
    own = {
        field.name: convert_value(field, run_options[field.name])
        for field in option_fields(Recipe)
        if field.name in run_options
    }
    recipe = replace(recipe, **own)
    check_recipe_values(recipe)
    options = make_from_values(RunOptions, {key: value for key, value in run_options.items() if key not in shared})
    world = init(comm)
    try:
        name = type(recipe).__name__.lower()
        with streams.dropping_streams(), watch_for_hangs():
            return train_recipe(recipe, name, options, build_config(name, recipe, options), world)
    finally:
        if comm is not None:
            # So that the next training can have another communicator; MPI itself goes on.
            shut_down_horovod()


def fit_from_command_line(
    cls: type[Recipe], name: str, given: dict[str, Any], world: World, membership: Membership | None = None
) -> dict[str, Any]:
    """Train with the options given on the command line; with --resume, the others come from the run's config.json."""
    if given.get("resume"):
        agree_on_given_options(cls, name, given)
        given = merge_saved_options(Path(given["run_dir"]), cls, name, given)
    if membership is not None:
        check_elastic_options(given)
    recipe, options = split_options(cls, given)
    agree_on_options(recipe, name, options)
    return train_recipe(recipe, name, options, build_config(name, recipe, options), world, membership)


def build_config(name: str, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """What config.json holds."""
    kept = {key: value for key, value in asdict(options).items() if key not in EXCLUDED_FROM_CONFIG}
    values = {field.name: getattr(recipe, field.name) for field in option_fields(type(recipe))} | kept
    return {"recipe": name, "options": {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}}


def merge_saved_options(run_dir: Path, cls: type[Recipe], name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Options of rank 0's config.json, overridden by those given now; the same on every rank.

    Raises UserError if the file is of another recipe or cannot be read. A folder without one is a run that never began.
    """
    options = collectives.on_root("config", lambda: read_saved_options(run_dir, cls, name))
    for option, other in (("epochs", "steps"), ("batch_size", "batch_per_rank"), ("batch_size", "scale_lr")):
        if option in given:
            options.pop(other, None)
    return {**options, **given}


def read_saved_options(run_dir: Path, cls: type[Recipe], name: str) -> dict[str, Any]:
    """The options in a run folder's config.json; none if there is no such file. Raises UserError."""
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
