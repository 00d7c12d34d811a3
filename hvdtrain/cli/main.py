"""The `hvdtrain` command: finds the subcommand, imports only that one, and turns errors into one line and a code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import NoReturn

import click

from hvdtrain import __version__
from hvdtrain.system import streams
from hvdtrain.system.errors import EXIT_FAILED, EXIT_USER, RecipeError, RunError, UserError, nearest
from hvdtrain.system.exits import end_process

# name: (module, help). The help stands here so that `hvdtrain --help` imports no command.
COMMANDS = {
    "train": ("hvdtrain.cli.train", "Train a recipe; this process is one rank."),
    "launch": ("hvdtrain.cli.launch", "Start `hvdtrain train` on many ranks and hosts."),
    "list": ("hvdtrain.cli.list", "List the recipes found."),
    "bench": ("hvdtrain.cli.bench", "Measure the network, the step and gradient compression on many ranks."),
    "agent": ("hvdtrain.cli.agent", "Keep a host in the membership folder until it is to be preempted."),
    "ledger": ("hvdtrain.cli.ledger", "See whether a run visited every example exactly once."),
    "doctor": ("hvdtrain.cli.doctor", "See what is wrong with this host, or with several and what joins them."),
    "horovod": ("hvdtrain.cli.horovod", "Build Horovod for the installed torch, or check it."),
}


# What these are for is not what they print.
OUTPUT_IS_OPTIONAL = ("train", "launch", "agent")


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            raise UserError(f"no command {cmd_name!r}{nearest(cmd_name, COMMANDS)}")
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup)
@click.version_option(__version__)
def cli() -> None:
    """Train one recipe on any number of ranks, exactly, over Horovod.

    Each command has its own --help.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 (failed), 2 (user's mistake), 75 (requeue).

    As a program of its own, without `args`, end whatever a recipe has left running.
    """
    try:
        run(args)
    except SystemExit as end:
        if args is None:
            end_process(end.code if isinstance(end.code, int) else EXIT_FAILED)
        raise


def run(args: list[str] | None) -> NoReturn:
    """Run the command line and raise SystemExit with its exit code."""
    streams.install()
    try:
        # Commands return their exit code; click returns its own for --help and --version.
        args = sys.argv[1:] if args is None else args
        code = cli.main(args or ["--help"], prog_name="hvdtrain", standalone_mode=False)
        if not code and args[:1] not in ([name] for name in OUTPUT_IS_OPTIONAL):
            check_output()
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        fail(str(error), EXIT_USER)
    except click.ClickException as error:
        fail(error.format_message(), EXIT_USER)
    except RecipeError as error:
        click.echo(error.trace, err=True, nl=False)
        fail(str(error), EXIT_FAILED)
    except RunError as error:
        fail(str(error), EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)


def check_output() -> None:
    """End with 1 if not all of standard output could be written; without a message if its reader has left."""
    lost = streams.dropped().get("stdout")
    if lost is not None and lost.error == os.strerror(errno.EPIPE):
        sys.exit(EXIT_FAILED)
    if lost is not None:
        fail(f"{lost.size} bytes of output could not be written: {lost.error}", EXIT_FAILED)


def fail(message: str, code: int) -> NoReturn:
    """End with a message on standard error."""
    click.echo(f"hvdtrain: error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
