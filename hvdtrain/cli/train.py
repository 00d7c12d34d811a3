"""`hvdtrain train`: this process is one rank."""

from __future__ import annotations

import os
import sys

import click

from hvdtrain.cli import options
from hvdtrain.cli.rank import begin, leaving_on_failure, share_cores, tell_failure
from hvdtrain.comm.world import FUSION_BYTES
from hvdtrain.elastic import membership, places
from hvdtrain.elastic.supervisor import Supervisor
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.registry import load
from hvdtrain.recipe.source import RecipeSource
from hvdtrain.recipe.source_copy import read_copy
from hvdtrain.system import activity
from hvdtrain.system.errors import EXIT_REQUEUE, EXIT_USER, Requeued, UserError
from hvdtrain.training.hang import watching
from hvdtrain.training.options import refuse_elastic

HELP = """Train a recipe. This process is one rank: alone, or started by `hvdtrain launch`, horovodrun, mpirun or srun.

RECIPE is a name (`hvdtrain list`), a path (my/recipe.py) or my/recipe.py:ClassName. Its own options and the run
options follow it; `hvdtrain train RECIPE --help` lists both, with the recipe's defaults.

Exit codes: 0 done, 1 failed, 2 a mistake in the options, 75 asked to stop (SIGTERM, SIGUSR1 or Ctrl-C) and saved:
go on with --resume --run-dir DIR."""


@click.command(
    "train",
    help=HELP,
    add_help_option=False,
    options_metavar="",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("recipe", required=False, metavar="RECIPE")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE OPTIONS] [RUN OPTIONS]")
@click.pass_context
def command(ctx: click.Context, recipe: str | None, args: tuple[str, ...]) -> int:
    if recipe in (None, "--help", "-h"):
        if recipe is None:
            raise UserError("RECIPE is missing; `hvdtrain list` shows those found")
        formatter = ctx.make_formatter()
        ctx.command.format_help(ctx, formatter)
        options.TrainCommand("train", Recipe).format_options(ctx, formatter)
        click.echo(formatter.getvalue(), nl=False)
        return 0
    assert recipe is not None
    if os.environ.get("HOROVOD_ELASTIC") == "1" and places.MEMBER not in os.environ:
        return Supervisor([sys.executable, "-m", "hvdtrain", "train", recipe, *args], os.environ).run()
    member = membership.from_environment()
    ctx.with_resource(watching(command=True))
    activity.enter("importing the recipe", patient=True)
    try:
        arguments = arguments_of([recipe, *args], copy_of_run(member))
        options.check(arguments)
        if arguments.given.get("exchange") == "horovod":
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(FUSION_BYTES))
        activity.enter("meeting the other ranks", waits=True, patient=True)
        world = begin(member)
    except UserError as error:
        tell_failure(EXIT_USER, str(error), "")
        raise
    from hvdtrain.training.fit import fit_from_command_line

    with leaving_on_failure(member):
        summary = fit_from_command_line(arguments.cls, arguments.name, arguments.given, world, member)
    return 0 if summary["finished"] else EXIT_REQUEUE


def copy_of_run(member: membership.Membership | None) -> RecipeSource | None:
    """The recipe's source as the elastic run that this worker joins copied it: the file may have been edited since."""
    described = member.board.fact("source") if member is not None else None
    return read_copy(described) if described is not None else None


def arguments_of(args: list[str], source: RecipeSource | None = None) -> options.Arguments:
    """Import the recipe, from `source` if it is given, and parse its options. Raises UserError."""
    spec, *rest = args
    if spec.startswith("-"):
        raise UserError(f"RECIPE comes first and its options after it: hvdtrain train RECIPE {spec} ...")
    share_cores()  # before the recipe imports torch, and so for every library it brings
    try:
        cls = load(spec, source)
    except Requeued:
        raise
    except SystemExit as leaving:
        text = f"{spec} called sys.exit({leaving.code!r}) when it was imported"
        raise UserError(f"{text}: put what it runs under `if __name__ == '__main__':`") from None
    return options.parse(cls, spec, rest)


def check_arguments(args: list[str], elastic: bool = False) -> None:
    """What `hvdtrain launch` checks before any rank starts: RECIPE and its options. Raises UserError."""
    arguments = arguments_of(args)
    options.check(arguments)
    if elastic:
        refuse_elastic(arguments.given)
