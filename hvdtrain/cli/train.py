"""`hvdtrain train`: this process is one rank."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from dataclasses import replace
from typing import Any, NoReturn

import click

from hvdtrain import messages
from hvdtrain.cli import options
from hvdtrain.collectives.world import init, local_size_from_environment, rank_from_environment
from hvdtrain.elastic import membership
from hvdtrain.elastic.supervisor import Supervisor
from hvdtrain.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER, RunError, UserError
from hvdtrain.finder import load
from hvdtrain.recipe import Recipe

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
    if os.environ.get("HOROVOD_ELASTIC") == "1" and membership.MEMBER not in os.environ:
        return Supervisor([sys.executable, "-m", "hvdtrain", "train", recipe, *args], os.environ).run()
    member = membership.from_environment()
    try:
        arguments = arguments_of([recipe, *args])
        options.check(arguments)
        if arguments.given.get("exchange") == "horovod":
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(128 << 20))  # its own default, which init lowers
        world = init()
    except UserError as error:
        messages.send("failed", **_who(), code=EXIT_USER, error=str(error), traceback="")
        raise
    if member is not None:
        world = replace(world, local_rank=member.slot.local_rank, local_size=member.slot.local_size)
    else:
        messages.send("started", rank=world.rank, host=world.host, pid=os.getpid())
    from hvdtrain.trainer.fit import fit_from_command_line

    try:
        summary = fit_from_command_line(arguments.cls, arguments.name, arguments.given, world, member)
    except membership.Left:
        quit_at_once(EXIT_REQUEUE)
    except membership.Expelled:
        quit_at_once(EXIT_FAILED)
    except membership.Over as over:
        quit_at_once(over.code)
    except (UserError, RunError) as error:
        if member is not None and member.joined:
            member.end(EXIT_USER if isinstance(error, UserError) else EXIT_FAILED, str(error))
        leave(EXIT_USER if isinstance(error, UserError) else EXIT_FAILED, str(error), "")
    except KeyboardInterrupt:
        leave(130, "interrupted", "")
    except Exception as error:
        leave(EXIT_FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())
    return 0 if summary["finished"] else EXIT_REQUEUE


def arguments_of(args: list[str]) -> options.Arguments:
    """Import the recipe and parse its options. Raises UserError."""
    spec, *rest = args
    if spec.startswith("-"):
        raise UserError(f"RECIPE comes first and its options after it: hvdtrain train RECIPE {spec} ...")
    # Before torch is imported, and so for every library it brings.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_size_from_environment())))
    return options.parse(load(spec), spec, rest)


def check_arguments(args: list[str]) -> None:
    """What `hvdtrain launch` checks before any rank starts: RECIPE and its options. Raises UserError."""
    options.check(arguments_of(args))


def leave(code: int, error: str, trace: str) -> NoReturn:
    """End this rank at once, saying why; the launcher, or the broken connection, ends the others."""
    who = _who()
    messages.send("failed", **who, code=code, error=error, traceback=trace)
    if not messages.launched():
        prefix = f"rank {who['rank']} on {who['host']}: " if rank_from_environment() is not None else ""
        print(f"{trace}hvdtrain: error: {prefix}{error}", file=sys.stderr)
    quit_at_once(code)


def quit_at_once(code: int) -> NoReturn:
    """End this process without Horovod's exit handler, which would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _who() -> dict[str, Any]:
    return {"rank": rank_from_environment() or 0, "host": socket.gethostname()}
