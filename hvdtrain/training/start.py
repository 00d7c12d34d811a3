"""How a run starts: what all ranks have to agree on, its folder, and the state that it starts from."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdtrain import __version__
from hvdtrain.comm.agreement import ConsistentPart, check_against_record, check_agreement, make_agreement_record
from hvdtrain.comm.world import World
from hvdtrain.elastic.membership import Membership
from hvdtrain.elastic.records import AGREEMENT, FOLDER, LAUNCH
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.framework import Step
from hvdtrain.recipe.options import flatten_options
from hvdtrain.recipe.source import source_of_class
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.training.between import resume_run
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.folder import open_run_folder, take_over_folder
from hvdtrain.training.lease import RELAUNCH_VARIABLE, Lease
from hvdtrain.training.options import RunOptions

OPTIONS_COLLECTIVE = "agreement.options"
# Where a rank runs and what it shows may differ; rank 0 decides where the run's folder is.
PER_RANK_OPTIONS = ("device", "threads", "quiet", "run_dir")


def make_recipe_parts(cls: type[Recipe], name: str) -> list[ConsistentPart]:
    """The recipe by its name and class, and the files of its source."""
    source = source_of_class(cls)
    recipe = {"hvdtrain": __version__, "RECIPE": name, "the recipe's class": cls.__name__}
    return [
        ConsistentPart("recipe", recipe, "{key} is {here} on {who}, {there} on {base}"),
        ConsistentPart(
            "source files",
            source.file_digests if source is not None else {},
            "{who}: the recipe's file {key} differs from {base}'s: all ranks need the same",
        ),
    ]


def make_options_part(values: Mapping[str, Any]) -> ConsistentPart:
    """Options by their flags; those that may differ from rank to rank are left out.

    values: by the options' names. With --deterministic the number of threads is part of the maths.
    """
    left_out = [name for name in PER_RANK_OPTIONS if name != "threads" or not values.get("deterministic")]
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in values.items() if name not in left_out}
    return ConsistentPart("options", flags, "{key} is {here} on {who}, {there} on {base}", absent_text="not given")


def collect_option_values(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """The value of each option of the recipe and of the run."""
    run = flatten_options(options)
    return {"resume": run["resume"], **flatten_options(recipe), **run}


def agree_on_options(recipe: Recipe, name: str, options: RunOptions) -> None:
    """Return if all ranks have the same recipe, source and options. Raises UserError on all ranks."""
    check_agreement(
        OPTIONS_COLLECTIVE,
        [*make_recipe_parts(type(recipe), name), make_options_part(collect_option_values(recipe, options))],
    )


def agree_on_given_options(cls: type[Recipe], name: str, given: Mapping[str, Any]) -> None:
    """Return if all ranks resume with the same options given; the others are then those of the run's config.json.

    A rank that does not resume meets it with `agree_on_options`.
    """
    check_agreement(
        OPTIONS_COLLECTIVE,
        [*make_recipe_parts(cls, name), make_options_part({"resume": True, **dict(sorted(given.items()))})],
    )


def compare_with_run(
    membership: Membership,
    recipe: Recipe,
    name: str,
    options: RunOptions,
    step_parts: Sequence[ConsistentPart],
    world: World,
) -> None:
    """Compare a worker of an elastic run with what the first one recorded. Raises UserError, naming a difference."""
    parts = [
        *make_recipe_parts(type(recipe), name),
        make_options_part(collect_option_values(recipe, options)),
        *step_parts,
    ]
    check_against_record(parts, membership.store.put_if_absent(AGREEMENT, make_agreement_record(parts)), world)


def check_best_metric(recipe: Recipe, metrics: Sequence[str]) -> None:
    """Raise UserError if the recipe's `best` names no metric of its own or no direction."""
    metric, direction = recipe.best
    if metric not in metrics:
        raise UserError(
            f"{type(recipe).__name__}.best: there is no metric {metric!r}{suggest_nearest(metric, metrics)}"
        )
    if direction not in ("min", "max"):
        raise UserError(f"{type(recipe).__name__}.best: {direction!r} is no direction; expected 'min' or 'max'")


def begin_run(
    step: Step, options: RunOptions, name: str, world: World, membership: Membership | None, lease: Lease
) -> tuple[Path, Position]:
    """The run folder, and where to begin: at step 0, or with the newest checkpoint where there is reason to."""
    if membership is not None and (known := membership.store.get(FOLDER)):  # all that had a state are gone
        folder = take_over_folder(Path(known), lease)
        return folder, resume_run(step, folder, name, world, options.data.seed, unattended=True)
    if membership is not None and membership.generation > 1 and options.checkpoints.run_dir is not None:
        options = replace(
            options, checkpoints=replace(options.checkpoints, resume=True)
        )  # the first generation came so far as to make it
    folder = open_run_folder(options.checkpoints, name, lease)
    if options.checkpoints.resume:
        at = resume_run(step, folder, name, world, options.data.seed, unattended=RELAUNCH_VARIABLE in os.environ)
    else:
        at = Position()
        at.set_example_order(step.examples["train"], options.data.seed)
        at.first_examples = dict(step.first_examples)
    if membership is not None:
        membership.store.put_if_absent(FOLDER, str(folder.absolute()))
    return folder, at


def agree_on_launch_name(membership: Membership | None) -> str | None:
    """By what the processes of an elastic run, and those of its relaunches, know each other; None: not elastic."""
    if membership is None:
        return None
    name = membership.store.put_if_absent(LAUNCH, os.environ.get(RELAUNCH_VARIABLE) or secrets.token_hex(8))
    return name
