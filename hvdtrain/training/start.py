"""How a run starts: what all ranks have to agree on, its folder, the state that it starts from, and its first lines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdtrain import __version__
from hvdtrain.comm.agreement import ConsistentPart, check_agreement
from hvdtrain.comm.world import World
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import flatten_options
from hvdtrain.recipe.source import source_of_class
from hvdtrain.system.errors import RunError, UserError, suggest_nearest
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.folder import open_run_folder, take_over_folder
from hvdtrain.training.lease import RELAUNCH_VARIABLE
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import describe_training_plan
from hvdtrain.training.run import Generation, Run
from hvdtrain.training.saving import resume_run, start_order

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


def compare_with_run(run: Run, world: World) -> None:
    """Compare this process with those that began the run. Raises UserError, naming a difference."""

    def make_parts() -> list[ConsistentPart]:
        options_part = make_options_part(collect_option_values(run.recipe, run.options))
        return [*make_recipe_parts(type(run.recipe), run.name), options_part, *run.step.agreement_parts]

    run.membership.check_agreement(make_parts, world)


def check_best_metric(recipe: Recipe, metrics: Sequence[str]) -> None:
    """Raise UserError if the recipe's `best` names no metric of its own or no direction."""
    metric, direction = recipe.best
    if metric not in metrics:
        raise UserError(
            f"{type(recipe).__name__}.best: there is no metric {metric!r}{suggest_nearest(metric, metrics)}"
        )
    if direction not in ("min", "max"):
        raise UserError(f"{type(recipe).__name__}.best: {direction!r} is no direction; expected 'min' or 'max'")


def begin_run(run: Run, world: World) -> tuple[Path, Position]:
    """Find the run folder and begin: at step 0, or with the newest checkpoint if there is reason to.

    Returns:
        The run folder, and where the run begins. The state that belongs there is loaded.
    """
    options, membership = run.options.checkpoints, run.membership
    if membership.get_run_folder() is not None:  # an earlier generation has begun, and all that had a state are gone
        folder = take_over_folder(find_run_folder(run), run.lease)
        return folder, resume_run(run, folder, world.rank, unattended=True)
    if membership.change_count > 0 and options.run_dir is not None:
        options = replace(options, resume=True)  # the first generation may have come so far as to make it
    folder = open_run_folder(options, run.name, run.lease)
    if options.resume:
        position = resume_run(run, folder, world.rank, unattended=RELAUNCH_VARIABLE in os.environ)
    else:
        position = Position()
        start_order(run, position)
    membership.publish_run_folder(folder)
    return folder, position


def find_run_folder(run: Run) -> Path:
    """Return the folder of a run that an earlier generation has begun."""
    folder = run.membership.get_run_folder()
    if folder is None:
        raise RunError("the run folder is missing in the run's key-value store, or is not valid there")
    return folder


def report_generation(generation: Generation, position: Position, notes: Sequence[str]) -> None:
    """Print what is to be done; after a change of members, only who does it. notes: lines to print with it."""
    run, size = generation.run, generation.world.size
    if run.membership.change_count:
        ranks = f"{size} rank{'s' * (size > 1)}"
        run.report.print_lines([f"world     {ranks}, from step {position.step} on; {run.membership.formation_text}"])
        return
    threads = run.options.resolve_threads(generation.world.local_size)
    run.report.print_lines(
        [
            f"hvdtrain  {run.name} ({run.recipe.framework}), run folder {generation.folder}",
            *describe_training_plan(generation.plan, run.options),
            f"threads   {threads.count} per rank, from {threads.source}",
        ]
    )
    if run.options.checkpoints.resume:
        where = f"step {position.step}" if position.step else "step 0: no checkpoint yet"
        run.report.print_lines([f"resumed   at {where}"])
    elif not position.step:
        report_graph(run)
    run.report.print_lines(notes)


def report_graph(run: Run) -> None:
    """Write the model's graph for TensorBoard. All ranks call it: `score` may exchange something with the others."""
    try:
        run.report.write_graph(run.step.trace_graph())
    except UserError as error:
        run.report.print_lines([f"graph     not drawn: {error}"])
    except Exception as error:  # of the recipe, traced: it trains all the same
        run.report.print_lines([f"graph     not drawn, tracing failed: {type(error).__name__}"])
