"""Train a recipe: `hvdtrain.fit`, and what `hvdtrain train` calls.

fit or fit_from_command_line    make the recipe and the run options from what was given
  train_recipe                  of the whole run
    open_session                make what stays for the run: the framework's step, the report, the lease of the folder
    Session (session.py)        train in one generation of ranks after the other
      run_loop (loop.py)        train step by step
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdtrain.comm import collectives
from hvdtrain.comm.grid import check_same_shape
from hvdtrain.comm.world import World, init, keep_mpi, shut_down_horovod
from hvdtrain.elastic.membership import FixedMembership, Membership
from hvdtrain.recipe.base import Recipe, check_methods, refuse_two_schedules
from hvdtrain.recipe.framework import find_framework
from hvdtrain.recipe.kept_source import check_not_importing
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.options import OptionValues, convert_value, make_from_values, option_fields
from hvdtrain.recipe.shares import choose_shares
from hvdtrain.recipe.source import source_of_class
from hvdtrain.system import activity, streams
from hvdtrain.system.errors import KnownError, RunError, UserError, suggest_nearest
from hvdtrain.training.agreement import agree_on_given_options, agree_on_options, compare_with_run
from hvdtrain.training.config import build_config, override_options, read_saved_options
from hvdtrain.training.folder import choose_run_folder
from hvdtrain.training.hang import configure_hang_reporter, watch_for_hangs
from hvdtrain.training.lease import Lease, read_launch_name
from hvdtrain.training.loop import Ending
from hvdtrain.training.metrics import RecipeMetrics
from hvdtrain.training.options import RunOptions, check_elastic_options, check_recipe_values, split_options
from hvdtrain.training.reporter import Reporter
from hvdtrain.training.run import Run
from hvdtrain.training.service import whole_step
from hvdtrain.training.service_worker import announcing_failures, begin_service, follow_server
from hvdtrain.training.session import Session
from hvdtrain.training.start import check_recipe_metrics
from hvdtrain.training.stop import StopRequest
from hvdtrain.training.streams import leave_out_ledger
from hvdtrain.training.summary import Summary, end_run, make_summary, publish_ending, write_summary

lone_failures: list[str] = []  # errors by which this rank, of several, has left a training that others are still in


def fit(recipe: Recipe, comm: Any = None, **run_options: Any) -> dict[str, Any]:
    """Train a recipe on all ranks that run this, and return the summary (as in summary.json) on each.

    Args:
        recipe: the recipe.
        comm: an mpi4py communicator whose processes are the ranks; None: all that were launched.
        run_options: the run options of `hvdtrain train RECIPE --help`, e.g. run_dir="runs/x", resume=True, amp="bf16",
            epochs=3; those that a recipe has as fields (epochs, batch_size, lr, schedule) override it.

    Raises:
        UserError: for invalid input.
        RunError: for a run that cannot continue, e.g. a loss that is not finite.
    """
    check_not_importing("hvdtrain.fit")
    if lone_failures:
        raise RunError(
            f"an earlier hvdtrain.fit has failed on this rank alone ({lone_failures[0]}), and the others wait for it "
            "there: end this process, do not train again in it"
        )
    check_methods(type(recipe))
    recipe, options = apply_run_options(recipe, run_options)
    is_served = options.service.server is not None
    if is_served and comm is not None:
        raise UserError(f"--server {options.service.server} with a communicator: leave `comm` out")
    if is_served or options.find_grid_shape(1).flags:
        keep_mpi()
    world = init(comm)
    try:
        name = type(recipe).__name__.lower()
        with streams.dropping_streams(), watch_for_hangs():
            config = build_config(name, recipe, options)
            return train_recipe(recipe, name, options, config, world, FixedMembership()).to_json()
    except Exception as error:
        is_agreed = isinstance(error, (UserError, RunError)) or getattr(error, "origin", None) is not None
        if world.size > 1 and comm is None and not is_agreed:
            lone_failures.append(f"{error}" if isinstance(error, KnownError) else f"{type(error).__name__}: {error}")
        raise
    finally:
        if comm is not None or is_served:
            shut_down_horovod()  # so that the next training can have another communicator; MPI itself stays


def apply_run_options(recipe: Recipe, values: OptionValues) -> tuple[Recipe, RunOptions]:
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
    if "schedule" in values:
        refuse_two_schedules(type(recipe), values["schedule"])
    recipe = replace(recipe, **{name: convert_value(shared[name], values[name]) for name in shared if name in values})
    check_recipe_values(recipe)
    return recipe, make_from_values(RunOptions, {name: values[name] for name in values if name not in shared})


def fit_from_command_line(
    cls: type[Recipe], name: str, given: OptionValues, world: World, membership: Membership
) -> Summary:
    """Train with the options given on the command line; with --resume, the others come from the run's config.json."""
    if given.get("resume"):
        agree_on_given_options(cls, name, given)
        given = merge_saved_options(Path(given["run_dir"]), cls, name, given)
    if membership.world_may_change:
        check_elastic_options(given)
    recipe, options = split_options(cls, given)
    agree_on_options(recipe, name, options)
    return train_recipe(recipe, name, options, build_config(name, recipe, options), world, membership)


def merge_saved_options(run_dir: Path, cls: type[Recipe], name: str, given: OptionValues) -> OptionValues:
    """Return the options of rank 0's config.json, overridden by those given now; the same on every rank.

    Raises UserError if the file is of another recipe or cannot be read. A folder without one is a run that never began.
    """
    options = dict(collectives.on_root("config", lambda: read_saved_options(run_dir, cls, name)))
    return override_options(options, given)


def train_recipe(
    recipe: Recipe, name: str, options: RunOptions, config: Mapping[str, object], world: World, membership: Membership
) -> Summary:
    """Train a recipe on this rank and return the summary.

    Args:
        recipe: the recipe, with the values of its options.
        name: what the recipe is called in the run folder.
        options: the run options.
        config: what config.json is to hold.
        world: the one that Horovod was started in; a member of an elastic run is alone there.
        membership: how the ranks of the run are put together.

    Raises:
        UserError: for what a user can fix before the first step.
        RunError: for a run that cannot continue, e.g. a loss that is not finite.
        MembershipEnded: the run continues without this rank.
    """
    with open_session(recipe, name, options, config, world, membership) as session:
        service = session.run.service
        if service is not None and service.server is None:
            followed = follow_server(session.run, service, session.world)
            if isinstance(followed, Summary):
                return followed
            service = followed
            session.run = replace(session.run, service=service)
        with announcing_failures(service):
            generation, position, ending = session.run_generations()
        summary = make_summary(session, generation, position, finished=ending == Ending.FINISHED)
        error = write_summary(generation, summary)
    if service is not None and service.server is not None:
        publish_ending(generation, summary, error)
        service.server.end_run(summary.to_json(), error)
    end_run(generation, summary, error)
    return summary


@contextlib.contextmanager
def open_session(
    recipe: Recipe, name: str, options: RunOptions, config: Mapping[str, object], world: World, membership: Membership
) -> Iterator[Session]:
    """Prepare all that stays for a run, as `train_recipe` describes it, and yield this rank's part in the run."""
    framework = find_framework(type(recipe))
    configure_hang_reporter(world.rank, world.size, options.faults.hang_limit)
    activity.enter_activity("preparing the model and the datasets", patient=True)
    with contextlib.ExitStack() as exits:
        shape = options.find_grid_shape(world.local_size)
        if shape.flags and not membership.world_may_change:
            check_same_shape(shape)
        if shape.replica_ranks > 1:
            world = exits.enter_context(membership.enter_grid(world, shape, options.device.device))
        if not membership.world_may_change:
            choose_shares(options.data.shares, world.data_size)  # refused before anything is prepared
        folder = exits.enter_context(choose_run_folder(options.checkpoints, name, membership))
        options = replace(options, checkpoints=replace(options.checkpoints, run_dir=folder))
        if membership.world_may_change and options.exchange.shards_optimizer:
            options = replace(options, exchange=replace(options.exchange, mirror="1"))
        absolute = Path(collectives.on_root("run_folder.absolute", lambda: str(folder.absolute())))
        set_now(recipe, Now.before_training(absolute, world.rank, world.size))
        step = framework.make_step(recipe, world, options)
        metrics = RecipeMetrics(recipe, step.layout)
        report = Reporter(options.reports, metrics, step.gpu_uuid)
        lease = Lease(membership.agree_on_launch_name(read_launch_name(os.environ)))
        stop = exits.enter_context(StopRequest(membership))
        exits.enter_context(contextlib.closing(step))
        exits.enter_context(lease)
        exits.enter_context(report)
        run = Run(
            name=name,
            recipe=recipe,
            source=source_of_class(type(recipe)),
            options=leave_out_ledger(options, step.source),
            membership=membership,
            step=step,
            metrics=metrics,
            lease=lease,
            report=report,
            stop=stop,
        )
        collectives.on_all_ranks("metrics.trial", lambda: check_recipe_metrics(run))
        compare_with_run(run, world)
        if options.service.server is not None:
            service, world = begin_service(run, world)
            run = replace(run, service=service, step=whole_step(service))
        yield exits.enter_context(Session(run, world, config))
