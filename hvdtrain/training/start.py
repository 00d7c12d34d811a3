"""How a run starts: its folder, the state that it starts from, and its first lines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdtrain.comm.world import World
from hvdtrain.recipe.base import Recipe, is_overridden
from hvdtrain.recipe.framework import find_framework
from hvdtrain.recipe.metrics import MetricValue
from hvdtrain.recipe.now import TrialNow, temporary_now
from hvdtrain.system.errors import RunError, UserError, suggest_nearest
from hvdtrain.system.text import format_count
from hvdtrain.training.folder import open_run_folder, take_over_folder
from hvdtrain.training.lease import RELAUNCH_VARIABLE
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import describe_training_plan
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation, Run
from hvdtrain.training.saving import resume_run, start_order


def check_recipe_metrics(run: Run) -> None:
    """Compute the metrics of the trial once. Raises RecipeError, UserError for what is wrong with them."""
    values = run.metrics.extend_means(run.step.trial_means)
    used = [name for name in run.recipe.evals if run.step.examples[name]]
    check_metric_names(run.recipe, used, values)
    if not used:
        refuse_counting_evaluations(run.recipe, run.options)


def check_metric_names(recipe: Recipe, used: Sequence[str], values: Mapping[str, MetricValue]) -> None:
    """Raise UserError if two columns would have one name, or `best` names no metric of one number, or no direction.

    Without an evaluation, `best` may be anything.

    Args:
        recipe: the recipe.
        used: those of its `evals` that are evaluated.
        values: metrics of some examples, by name.
    """
    cls = type(recipe).__name__
    for name in recipe.evals:
        prefix = "eval" if name == recipe.evals[0] else name
        if taken := next((metric for metric in values if f"{prefix}_{metric}" in values), None):
            raise UserError(f"{cls}.score: '{prefix}_{taken}' is a column of the evaluation: rename it")
    if not used:
        return
    if not isinstance(recipe.best, (tuple, list)) or len(recipe.best) != 2:
        raise UserError(f"{cls}.best is {recipe.best!r}; expected a metric and 'min' or 'max', as ('loss', 'min')")
    metric, direction = recipe.best
    names = [m if name == recipe.evals[0] else f"{name}/{m}" for name in used for m in values]
    value = values.get(metric.rpartition("/")[2])
    if metric in names and isinstance(value, list):
        raise UserError(f"{cls}.best: {metric!r} has {len(value)} values; expected one number")
    if metric in values and metric not in names:
        raise UserError(
            f"{cls}.best: {metric!r} is of the evaluation set {recipe.evals[0]!r}, whose dataset is None; expected for "
            f"example {names[0]!r}"
        )
    if metric not in names and not is_overridden(recipe, "summarise"):
        raise UserError(f"{cls}.best: there is no metric {metric!r}{suggest_nearest(metric, names)}")
    if direction not in ("min", "max"):
        raise UserError(f"{type(recipe).__name__}.best: {direction!r} is not a direction; expected 'min' or 'max'")


def refuse_counting_evaluations(recipe: Recipe, options: RunOptions) -> None:
    """Raise UserError for what counts evaluations, as the recipe has none."""
    patience = options.data.patience
    counts = f"--patience {patience}" if patience is not None else f"--schedule {recipe.schedule!r}"
    if patience is not None or "plateau" in recipe.schedule:
        raise UserError(
            f"{counts} counts evaluations, and {type(recipe).__name__} has none: evals is {recipe.evals!r}, and "
            "dataset() returned nothing for them"
        )


def begin_run(run: Run) -> tuple[Path, Position]:
    """Find the run folder and begin: at step 0, or with the newest checkpoint if there is reason to.

    Returns:
        The run folder, and where the run begins. The state that belongs there is loaded.
    """
    options, membership = run.options.checkpoints, run.membership
    if membership.get_run_folder() is not None:  # an earlier generation has begun, and all that had a state are gone
        folder = take_over_folder(find_run_folder(run), run.lease)
        return folder, resume_run(run, folder, unattended=True)
    assert options.run_dir is not None  # chosen before the step was made
    resume = options.resume or membership.change_count > 0  # the first generation may have come so far as to make it
    folder = open_run_folder(options.run_dir, run.lease, resume=resume)
    if resume:
        position = resume_run(run, folder, unattended=RELAUNCH_VARIABLE in os.environ)
    else:
        position = Position()
        start_order(run, position)
    membership.publish_run_folder(folder)
    return folder, position


def load_first_weights(run: Run, position: Position) -> list[str]:
    """Load the weights of --init-from on all ranks, if the run is new; return lines to print.

    Raises:
        UserError: on all ranks, if the file cannot be read or does not fit the model.
    """
    options = run.options.checkpoints
    if options.init_from is None:
        return []
    if position.step:
        return [f"weights   of the checkpoint; --init-from {options.init_from} is not read"]
    framework = find_framework(type(run.recipe))
    if framework.load_weights is None:
        raise UserError(f"--init-from {options.init_from}: the framework {framework.name} cannot load weights")
    return framework.load_weights(run.step, options.init_from, options.init_partial)


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
        ranks = format_count(size, "rank")
        run.report.print_lines([f"world     {ranks}, from step {position.step} on; {generation.formation_text}"])
        return
    threads = run.options.resolve_threads(generation.world.local_size)
    run.report.print_lines(
        [
            f"hvdtrain  {run.name} ({run.recipe.framework}), run folder {generation.folder}",
            *describe_training_plan(generation.plan, run.options),
            *describe_grid(generation.world, run.options),
            f"threads   {threads.count} per rank, from {threads.source}",
            *describe_losses(generation),
            *describe_best(run),
            *run.step.take_messages(),
        ]
    )
    if run.options.checkpoints.resume:
        where = f"step {position.step}" if position.step else "step 0: no checkpoint yet"
        if position.ended:
            where += f", where the training has ended: {position.ended}"
        run.report.print_lines([f"resumed   at {where}"])
    elif not position.step:
        report_graph(run)
    run.report.print_lines(notes)


def describe_grid(world: World, options: RunOptions) -> list[str]:
    """Return a line on how ranks are divided, if they are."""
    if not world.is_grid:
        return []
    flags = options.find_grid_shape(world.local_size).flags
    replicas = format_count(world.size // world.replica_ranks, "replica")
    return [f"grid      {replicas} of {world.replica_ranks} ranks each ({flags})"]


def describe_losses(generation: Generation) -> list[str]:
    """Return a line on what a lost rank costs, if that is more than its time."""
    if generation.plan.rounds is None or not generation.run.membership.world_may_change:
        return []
    return [
        "loss      a lost rank takes along what it has changed in its round; the others keep theirs, and train its "
        "examples again in the same epoch"
    ]


def describe_best(run: Run) -> list[str]:
    """Return a line if the best checkpoint is chosen by a sum of several losses, which does not measure a model."""
    layout, evaluates = run.step.layout, any(run.step.examples[name] for name in run.recipe.evals)
    if not evaluates or not layout.several or "loss" in layout.names or run.recipe.best[0] != "loss":
        return []
    losses = " and ".join(layout.losses)
    return [f"best      is chosen by 'loss', the sum of {losses}: name a metric, e.g. best = ('accuracy', 'max')"]


def list_compared_tags(recipe: Recipe) -> list[str]:
    """Return the tags in TensorBoard of what runs are compared by: the loss in training, and the recipe's `best`."""
    name, slash, metric = recipe.best[0].partition("/")
    is_of_other = slash and name in recipe.evals[1:]
    return ["train/loss", f"{name}/{metric}" if is_of_other else f"eval/{recipe.best[0]}"]


def report_graph(run: Run) -> None:
    """Write the model's graph for TensorBoard. All ranks call it: `score` may exchange something with the others."""
    try:
        with temporary_now(run.recipe, TrialNow(**vars(run.recipe.now))):
            graph = run.step.trace_graph()
        run.report.write_graph(graph)
    except UserError as error:
        run.report.print_lines([f"graph     not drawn: {error}"])
    except Exception as error:  # of the recipe, traced: it trains all the same
        run.report.print_lines([f"graph     not drawn, tracing failed: {type(error).__name__}"])
