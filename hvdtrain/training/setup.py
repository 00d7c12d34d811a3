"""What is settled before the first step: the plan, the files of the run folder, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.ledger.reader import find_segments
from hvdtrain.ledger.rows import MAX_STEP_EXAMPLES
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.shares import MEASURED, choose_shares, format_shares
from hvdtrain.recipe.source import RecipeSource
from hvdtrain.recipe.source_copy import describe_copy, write_copy
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import PRIVATE_MODE, write_error_text, write_json
from hvdtrain.system.processes import ProcessTimeout, run_process
from hvdtrain.system.version import __version__
from hvdtrain.training.options import RunOptions
from hvdtrain.training.orders import EpochOrders
from hvdtrain.training.plan import TrainingPlan, make_training_plan
from hvdtrain.training.position import Position
from hvdtrain.training.ragged import refuse_several_passes, refuse_uneven_calls
from hvdtrain.training.rows import find_ledger_gap
from hvdtrain.training.run import Run
from hvdtrain.training.service import cut_recipe, plan_service
from hvdtrain.training.streams import check_division, check_length, refuse_unnumbered_rounds

GIT_SECONDS = 5.0  # for git to name the commit
REPORTED_PACKAGES = ("torch", "torchvision", "horovod", "numpy", "mpi4py")
REPORTED_IF_IMPORTED = ("jax", "jaxlib", "optax", "flax", "equinox", "keras", "tensorflow")


def plan_generation(run: Run, world: World, position: Position, orders: EpochOrders) -> TrainingPlan:
    """Return the plan of a generation that begins at `position`. Raises UserError if it cannot be carried out."""
    step = run.step
    check_length(run.options, orders.order.examples, run.recipe.schedule)
    option = run.options.data.shares
    shares = choose_shares(option, world.data_size, position.shares)
    recipe = run.recipe if run.service is None else cut_recipe(run.recipe, run.service.roles)
    plan = make_training_plan(recipe, run.options, orders.order.examples, step.base_learning_rate(), shares, position)
    if run.service is not None:
        plan = plan_service(run.service, plan, run.options, position)
    check_division(
        step.source,
        plan,
        position,
        world_may_change=run.membership.world_may_change,
        shares_may_change=option == MEASURED and world.size > 1,
    )
    plan = replace(plan, order_text=orders.describe())
    check_passes(run, plan, position)
    if plan.rounds is not None and run.membership.world_may_change:
        refuse_unnumbered_rounds(step.source, plan.rounds.steps)
    position.shares = format_shares(shares)
    return plan


def check_passes(run: Run, plan: TrainingPlan, position: Position) -> None:
    """Raise UserError for passes that a `score` with collectives cannot have."""
    step = run.step
    if step.score_needs_whole_batch:
        refuse_several_passes(type(run.recipe).__name__, plan)
    if plan.rounds is not None and step.score_uses_collectives:
        raise UserError(
            f"{type(run.recipe).__name__}.score calls collectives, and in --local-steps {plan.rounds.steps} ranks have "
            "different weights: leave out --local-steps"
        )
    if step.score_uses_collectives:
        refuse_uneven_calls(type(run.recipe).__name__, plan, step.examples, position)


def write_run_files(run: Run, folder: Path, config: Mapping[str, object]) -> list[str]:
    """Write config.json and the recipe's source on rank 0, as nothing is left to refuse; return lines to print.

    Raises:
        UserError: on all ranks, if they cannot be written.
    """
    write_config(folder, config)
    if run.source is None:
        return []
    note = copy_source(folder, run.source)
    run.membership.publish_recipe_copy(partial(describe_copy, folder, run.source))
    return [note] if note else []


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write config.json on rank 0. Raises UserError on all ranks if it cannot be written."""

    def write_on_root() -> None:
        try:
            write_json(folder / "config.json", config, PRIVATE_MODE)  # options may hold secrets
        except OSError as error:
            raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error

    collectives.on_root("config.written", write_on_root)


def copy_source(folder: Path, source: RecipeSource) -> str | None:
    """Write the recipe's files to RUN_DIR/source/ on rank 0; return a line if they have changed since the run began.

    Raises:
        UserError: on all ranks, if they cannot be written.
    """

    def write_on_root() -> str | None:
        try:
            return write_copy(folder, source)
        except OSError as error:
            raise UserError(write_error_text("the recipe's source", folder, error)) from error

    return collectives.on_root("source.written", write_on_root)


def open_ledger(
    known: Ledger | None, options: RunOptions, plan: TrainingPlan, position: Position, folder: Path
) -> Ledger:
    """Return this rank's ledger, as of `position`; rank 0 writes it.

    Args:
        known: what this rank or another one has written in an earlier generation; None: a new ledger.
        options: whether there is to be one.
        plan: the sizes that it records.
        position: where the run begins or continues.
        folder: the run folder.

    Raises:
        UserError: for a batch too large for it; and on all ranks, if it cannot be written when the run starts.
    """
    if options.checkpoints.ledger and plan.batch_size > MAX_STEP_EXAMPLES:
        raise UserError(
            f"the ledger records at most {MAX_STEP_EXAMPLES} examples per step, this run has {plan.batch_size}: "
            "add --no-ledger"
        )
    ledger = known or Ledger(options.data.seed, plan.examples, plan.batch_size, position.step)
    ledger.service = plan.service.encode() if plan.service is not None else ""
    ledger.roll_back(position.step)
    ledger.set_shares(position.step + 1, position.shares)

    def begin_segment() -> None:
        if not options.checkpoints.ledger and (known is not None or not find_segments(folder / "ledger")):
            return
        if known is None and options.checkpoints.ledger and (gap := find_ledger_gap(folder / "ledger", position.step)):
            print(f"hvdtrain: warning: {gap}", file=sys.stderr, flush=True)
        # The first segment shows whether it can be written; a resumed run that makes no step leaves no further one.
        again = options.checkpoints.ledger and bool(find_segments(folder / "ledger"))
        ledger.open_for_writing(folder / "ledger", at_first_row=again)
        if known is None and ledger.error is not None:
            raise UserError(write_error_text("the ledger", folder, ledger.error))
        if not options.checkpoints.ledger:  # the segment, which has no rows, supersedes the steps that are undone
            ledger.close()

    collectives.on_root("ledger", begin_segment)
    return ledger


def collect_versions() -> dict[str, str]:
    """Return the versions of what a run depends on, by package."""
    found = {"hvdtrain": __version__, "python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        # torch's own names the build, as in 2.14.1+cu130.
        own = str(getattr(sys.modules.get(package), "__version__", installed))
        found[package] = own if own.startswith(installed) else installed
    modules = {name: sys.modules[name] for name in REPORTED_IF_IMPORTED if name in sys.modules}
    return found | {name: module.__version__ for name, module in modules.items() if hasattr(module, "__version__")}


def name_git_commit(run: Run) -> str | None:
    """Return the commit of the repository that rank 0's recipe is in, on all ranks."""
    folder = run.source.main_path.parent if run.source is not None else None
    return collectives.on_root("git_commit", lambda: find_git_commit(folder) if folder is not None else None)


def find_git_commit(folder: Path) -> str | None:
    """Return the commit that is checked out in a folder, with "-dirty" if files differ from it; None without one."""
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = run_process(command, GIT_SECONDS)
    except (OSError, ValueError, ProcessTimeout):
        return None
    return done.stdout.strip() or None if done.exit_code == 0 else None
