"""`hvdtrain.fit`: a recipe, a place in the world, and off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World, init, shut_down_horovod
from hvdtrain.elastic.membership import Membership
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import convert_value, flatten_options, make_from_values, option_fields
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
    recipe, options = apply_run_options(recipe, run_options)
    world = init(comm)
    try:
        name = type(recipe).__name__.lower()
        with streams.dropping_streams(), watch_for_hangs():
            return train_recipe(recipe, name, options, build_config(name, recipe, options), world)
    finally:
        if comm is not None:
            # So that the next training can have another communicator; MPI itself goes on.
            shut_down_horovod()


def apply_run_options(recipe: Recipe, values: Mapping[str, Any]) -> tuple[Recipe, RunOptions]:
    """Split what `fit` is given: the four options that every recipe has go into a copy of it. Raises UserError."""
    shared = {field.name: field for field in option_fields(Recipe)}
    run_names = [field.name for field in option_fields(RunOptions)]
    for name in values:
        if name in shared or name in run_names:
            continue
        cls = type(recipe).__name__
        if name in {field.name for field in option_fields(type(recipe))}:
            raise UserError(f"{name!r} is a field of the recipe: give it to {cls}({name}=...), not to fit")
        own = [field.name for field in option_fields(type(recipe)) if field.name not in shared]
        near = suggest_nearest(name, [*own, *shared, *run_names], list_all=False)
        raise UserError(
            f"fit has no option {name!r}{near}; run options: {', '.join(sorted([*shared, *run_names]))}; "
            f"fields of the recipe, for {cls}(...): {', '.join(own) or 'none'}"
        )
    recipe = replace(recipe, **{name: convert_value(shared[name], values[name]) for name in shared if name in values})
    check_recipe_values(recipe)
    return recipe, make_from_values(RunOptions, {name: values[name] for name in values if name not in shared})


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
    kept = {name: value for name, value in flatten_options(options).items() if name not in EXCLUDED_FROM_CONFIG}
    values = flatten_options(recipe) | kept
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
