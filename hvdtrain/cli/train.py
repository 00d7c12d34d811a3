"""`hvdtrain train`: this process is one rank."""

from __future__ import annotations

import os
import sys

import click

from hvdtrain.cli import options
from hvdtrain.cli.config_file import format_config
from hvdtrain.cli.rank import exit_on_failure, report_failure, set_rank_threads, start_rank
from hvdtrain.comm.mpi_messages import was_started_by_mpi
from hvdtrain.comm.world import HOROVOD_FUSION_BYTES, keep_mpi, rank_from_environment
from hvdtrain.elastic.elastic_membership import membership_from_environment
from hvdtrain.elastic.membership import Membership
from hvdtrain.elastic.slot import MEMBER_VARIABLE
from hvdtrain.elastic.supervisor import Supervisor
from hvdtrain.exchange.step_options import asks_for_grid
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.recipe.source import RecipeSource
from hvdtrain.recipe.source_copy import read_copy
from hvdtrain.system import activity
from hvdtrain.system.collection import pause_collection
from hvdtrain.system.errors import EXIT_REQUEUE, RequeueExit, UserError
from hvdtrain.training.hang import watch_for_hangs
from hvdtrain.training.options import check_elastic_options

TRAIN_HELP = """Train a recipe.

This process is one rank: alone, or started by `hvdtrain launch`, horovodrun, mpirun or srun.

RECIPE is a name (`hvdtrain list`), a path (my/recipe.py) or my/recipe.py:ClassName. Its own options follow it; run
options may stand before or after it. `hvdtrain train RECIPE --help` lists both, with the recipe's defaults.

Exit codes: 0 done, 1 failed, 2 a mistake in the options, 75 asked to stop (SIGTERM, SIGUSR1 or Ctrl-C) and saved:
continue with --resume --run-dir DIR."""


@click.command(
    "train",
    help=TRAIN_HELP,
    add_help_option=False,
    options_metavar="",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE [RECIPE OPTIONS] [RUN OPTIONS]")
@click.pass_context
def train_command(ctx: click.Context, args: tuple[str, ...]) -> int:
    recipe, rest = options.split_recipe(args)
    if recipe is None:
        formatter = ctx.make_formatter()
        ctx.command.format_help(ctx, formatter)
        options.TrainCommand("train", Recipe).format_options(ctx, formatter)
        click.echo(formatter.getvalue(), nl=False)
        return 0
    if os.environ.get("HOROVOD_ELASTIC") == "1" and MEMBER_VARIABLE not in os.environ:
        return Supervisor([sys.executable, "-m", "hvdtrain", "train", recipe, *rest], os.environ).supervise_worker()
    membership = membership_from_environment()
    ctx.with_resource(watch_for_hangs(command=True))
    activity.enter_activity("importing the recipe", patient=True)
    with pause_collection():
        try:
            arguments = load_arguments([recipe, *rest], read_recipe_copy(membership))
            options.check_parsed_arguments(arguments)
        except UserError as error:
            report_failure(error.exit_code, str(error), "")
            raise
        if arguments.print_config:
            return print_config(arguments)
        if arguments.given_options.get("exchange") == "horovod":
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(HOROVOD_FUSION_BYTES))
        given = arguments.given_options
        is_resumed = given.get("resume") and was_started_by_mpi()  # maybe a run with a parameter server
        if asks_for_grid(given) or given.get("server") is not None or is_resumed:
            keep_mpi()
        activity.enter_activity("meeting the other ranks", waits=True, patient=True)
        with exit_on_failure(membership):
            world = start_rank(membership)
        from hvdtrain.training.fit import fit_from_command_line

    with exit_on_failure(membership):
        summary = fit_from_command_line(
            arguments.recipe_class, arguments.name, arguments.given_options, world, membership
        )
    return 0 if summary.finished else EXIT_REQUEUE


def read_recipe_copy(membership: Membership) -> RecipeSource | None:
    """Return the recipe's source as the elastic run that this worker joins copied it: it may have been edited since."""
    described = membership.get_recipe_copy()
    return read_copy(described) if described is not None else None


def load_arguments(args: list[str], source: RecipeSource | None = None) -> options.TrainArguments:
    """Import the recipe, from `source` if it is given, and parse its options. Raises UserError."""
    spec, rest = options.split_recipe(args)
    if spec is None:
        raise UserError("RECIPE is missing; `hvdtrain list` shows those found")
    set_rank_threads()  # before the recipe imports torch, and so for every library it brings
    try:
        cls = load_recipe(spec, source, find_backend_value(rest))
    except RequeueExit:
        raise
    except SystemExit as leaving:
        text = f"{spec} called sys.exit({leaving.code!r}) when it was imported"
        raise UserError(f"{text}: put what it runs under `if __name__ == '__main__':`") from None
    return options.parse_arguments(cls, spec, rest)


def find_backend_value(args: list[str]) -> str | None:
    """Return what --backend says, which is needed before the recipe is imported and its options are known."""
    found = None
    for place, word in enumerate(args):
        flag, equals, value = word.partition("=")
        if flag == "--backend":
            found = value if equals else next(iter(args[place + 1 :]), None)
    return found


def print_config(arguments: options.TrainArguments) -> int:
    """Print all options on rank 0, for `--config`; return the exit code. Raises UserError."""
    if not rank_from_environment():
        click.echo(format_config(arguments.recipe_class, arguments.name, arguments.given_options))
    return 0


def check_arguments(args: list[str], elastic: bool = False) -> options.TrainArguments:
    """Return RECIPE and its options, checked as `hvdtrain launch` does before any rank starts. Raises UserError."""
    arguments = load_arguments(args)
    options.check_parsed_arguments(arguments)
    if elastic:
        check_elastic_options(arguments.given_options)
    return arguments
