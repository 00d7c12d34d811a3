"""`hvdtrain.fit`, also on ranks that it starts: from a script or a notebook, in a process that is not a rank itself.

fit(recipe, ranks=2) --> the recipe's file, or one that is written for it --> hvdtrain train FILE on each rank,
                         all options as a file in the run folder              as `hvdtrain launch` starts it
                     <-- summary.json, or the error of the rank that failed first <--
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvdtrain.comm.world import rank_from_environment
from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.options import HostSource, LaunchOptions
from hvdtrain.launch.run import JobResult
from hvdtrain.launch.start import launch_job
from hvdtrain.recipe.base import Recipe, check_methods
from hvdtrain.recipe.base_classes import RecipeStatus
from hvdtrain.recipe.classes import read_classes
from hvdtrain.recipe.kept_source import check_not_importing
from hvdtrain.recipe.main_source import MAIN, make_main_source
from hvdtrain.recipe.registry import choose_default_class
from hvdtrain.recipe.source import RecipeSource, source_of_class
from hvdtrain.recipe.source_copy import SOURCE_FOLDER, write_copy
from hvdtrain.system.errors import EXIT_REQUEUE, EXIT_USER_ERROR, RecipeError, RunError, UserError
from hvdtrain.system.files import PRIVATE_MODE, write_error_text, write_json
from hvdtrain.system.strict_json import JsonObject, parse_strict_json
from hvdtrain.training import fit as training
from hvdtrain.training.config import build_config
from hvdtrain.training.folder import make_unused_folder, refuse_used_folder
from hvdtrain.training.lease import Lease
from hvdtrain.training.options import RunOptions

OPTIONS_FILE = "options.json"  # in the run folder


def fit(
    recipe: Recipe, comm: Any = None, *, ranks: int | None = None, hosts: str | None = None, **run_options: Any
) -> JsonObject:
    """Train a recipe and return the summary (as in summary.json).

    Without `ranks` and `hosts`, this process is one of the ranks: alone, or of those that a launcher has started, each
    of which calls this.

    Args:
        recipe: the recipe.
        comm: an mpi4py communicator whose processes are the ranks; None: all that were launched.
        ranks: start as many on this host, or on `hosts`, as `hvdtrain launch -np` does, and wait for them.
        hosts: as -H of `hvdtrain launch`, e.g. "a:4,b:4"; the run folder must be shared by them.
        run_options: the run options of `hvdtrain train RECIPE --help`, e.g. run_dir="runs/x", resume=True, amp="bf16",
            epochs=3; those that a recipe has as fields (epochs, batch_size, lr, schedule) override it.

    Raises:
        UserError: for invalid input.
        RunError: for a run that cannot continue, e.g. a loss that is not finite, or of which a rank was lost.
        RecipeError: for an error in the recipe's own code.
        KeyboardInterrupt: ranks were started, and ended by Ctrl-C before they had a state to save.
    """
    if ranks is None and hosts is None:
        return training.fit(recipe, comm, **run_options)
    check_starting_process(recipe, comm, "ranks" if ranks is not None else "hosts", ranks)
    recipe, options = training.apply_run_options(recipe, run_options)
    launch_options = LaunchOptions(
        launcher=LAUNCHERS.get("horovodrun"), num_ranks=ranks, source=HostSource(hosts=hosts)
    )
    with open_folder(recipe, options) as folder:
        args = ["train", write_recipe(recipe, folder), "--run-dir", str(folder)]
        args += ["--config", str(write_options(recipe, options, folder))]
        args += ["--resume"] if options.checkpoints.resume else []
        return conclude_fit(launch_job(args, launch_options, lambda: None), folder)


def check_starting_process(recipe: Recipe, comm: object, option: str, ranks: object) -> None:
    """Raise UserError if this process cannot start ranks."""
    check_not_importing("hvdtrain.fit")
    check_methods(type(recipe))
    if comm is not None:
        raise UserError(f"fit({option}=...) starts ranks, and comm names processes that are the ranks: give one")
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
        raise UserError(f"fit(ranks={ranks!r}): expected a number of ranks, 1 or more")
    if (rank := rank_from_environment()) is not None:
        raise UserError(
            f"fit({option}={ranks or '...'}) starts ranks, and this process is rank {rank} of a launch already: leave "
            f"{option} out or, if it is called while a recipe is imported, put it under `if __name__ == '__main__':`"
        )
    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"fit({option}=...) handles Ctrl-C for its ranks: call it in the main thread")


@contextlib.contextmanager
def open_folder(recipe: Recipe, options: RunOptions) -> Iterator[Path]:
    """Yield the run folder, made if need be; what is in it is removed again if no run has begun there."""
    given, name = options.checkpoints.run_dir, type(recipe).__name__.lower()
    try:
        if given is None:
            folder = make_unused_folder(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        else:
            folder = given
            folder.mkdir(parents=True, exist_ok=True)
            if not options.checkpoints.resume:
                refuse_used_folder(folder, Lease(None))
    except OSError as error:
        raise UserError(f"run folder {given or 'runs'} cannot be written: {error.strerror}") from error
    try:
        yield folder
    finally:
        if not (folder / "config.json").exists():
            (folder / OPTIONS_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder / SOURCE_FOLDER, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds something else
                folder.rmdir()


def write_recipe(recipe: Recipe, folder: Path) -> str:
    """Return RECIPE for the command line; a class of __main__ is written to a file in the run folder."""
    cls = type(recipe)
    if cls.__module__ != MAIN:
        found = source_of_class(cls)
        if found is None or "." in cls.__qualname__:
            raise UserError(
                f"recipe {cls.__qualname__} is not at the top of a file, where ranks find it: move it there"
            )
        return name_class(found, cls)
    source = make_main_source(cls, folder / SOURCE_FOLDER)
    try:
        if note := write_copy(folder, source):
            print(note)
    except OSError as error:
        raise UserError(write_error_text("the recipe's source", folder, error)) from error
    return name_class(source, cls)


def name_class(source: RecipeSource, cls: type) -> str:
    """Return `FILE`, or `FILE:Class` if the file alone means another class."""
    recipes = [seen.name for seen in read_classes(source) if seen.status == RecipeStatus.RECIPE]
    is_default = choose_default_class(source.main_path, recipes) == cls.__name__
    return f"{source.main_path}" if is_default else f"{source.main_path}:{cls.__name__}"


def write_options(recipe: Recipe, options: RunOptions, folder: Path) -> Path:
    """Write all options to a file, which only this user can read: some may be secrets. Raises UserError."""
    path = folder / OPTIONS_FILE
    try:
        write_json(path, build_config(type(recipe).__name__.lower(), recipe, options), PRIVATE_MODE)
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error
    return path


def conclude_fit(result: JobResult, folder: Path) -> JsonObject:
    """Return the summary of a run that has ended or was stopped and saved; else raise why it has none."""
    if result.exit_code in (0, EXIT_REQUEUE) and (folder / "summary.json").exists():
        summary: JsonObject = parse_strict_json((folder / "summary.json").read_bytes())
        return summary
    if result.exit_code == EXIT_REQUEUE or result.exit_code > 128:
        raise KeyboardInterrupt
    reason, _, trace = result.reason.removeprefix("error: ").partition("\n")
    if result.exit_code == EXIT_USER_ERROR:
        raise UserError(reason)
    raise RecipeError(reason, trace) if trace.startswith("Traceback") else RunError(reason)
