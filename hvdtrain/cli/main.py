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
from hvdtrain.system.errors import EXIT_FAILED, EXIT_USER_ERROR, KnownError, UserError, suggest_nearest
from hvdtrain.system.exits import exit_process

# name: (module, help). The help is here so that `hvdtrain --help` imports no command.
SUBCOMMANDS = {
    "train": ("hvdtrain.cli.train", "Train a recipe; this process is one rank."),
    "launch": ("hvdtrain.cli.launch", "Start a recipe, or any program, on many ranks and hosts."),
    "evaluate": ("hvdtrain.cli.evaluate", "Evaluate a checkpoint of a run."),
    "predict": ("hvdtrain.cli.predict", "Write the outputs of a run's model for examples of a file or a split."),
    "plan": ("hvdtrain.cli.plan", "Print the memory of a rank for each way to lay a recipe out on many ranks."),
    "list": ("hvdtrain.cli.list", "List the recipes found."),
    "bench": ("hvdtrain.cli.bench", "Measure the network, the step and gradient compression on several ranks."),
    "discover": ("hvdtrain.cli.discover", "Print the current hosts, for elastic training."),
    "agent": ("hvdtrain.cli.agent", "Keep a host in the membership folder until its preemption is announced."),
    "ledger": ("hvdtrain.cli.ledger", "Check whether a run visited every example exactly once."),
    "doctor": ("hvdtrain.cli.doctor", "Diagnose this host, or several hosts and the network between them."),
    "horovod": ("hvdtrain.cli.horovod", "Build Horovod for the installed torch, or check it."),
}

# What these commands are for is not what they print: lost output is not an error.
OUTPUT_OPTIONAL_COMMANDS = ("train", "launch", "agent")


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name.endswith(".py"):
            raise UserError(f"no command {cmd_name!r}; to start a recipe or program: hvdtrain launch -np N {cmd_name}")
        if cmd_name not in SUBCOMMANDS:
            raise UserError(f"no command {cmd_name!r}{suggest_nearest(cmd_name, SUBCOMMANDS)}")
        command: click.Command = getattr(importlib.import_module(SUBCOMMANDS[cmd_name][0]), f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def root_command() -> None:
    """Train one recipe on any number of ranks, exactly, over Horovod.

    Each command has its own --help.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 (failed), 2 (user's mistake), 75 (requeue).

    As a program of its own, without `args`, end whatever a recipe has left running.
    """
    try:
        run_command_line(args)
    except SystemExit as end:
        if args is None:
            exit_process(end.code if isinstance(end.code, int) else EXIT_FAILED)
        raise


def run_command_line(args: list[str] | None) -> NoReturn:
    """Run the command line and raise SystemExit with its exit code."""
    streams.install_dropping_streams()
    try:
        # Commands return their exit code; click returns its own for --help and --version.
        args = sys.argv[1:] if args is None else args
        code = root_command.main(args or ["--help"], prog_name="hvdtrain", standalone_mode=False)
        if not code and args[:1] not in ([name] for name in OUTPUT_OPTIONAL_COMMANDS):
            check_output_written()
        sys.exit(code if isinstance(code, int) else 0)
    except KnownError as error:
        click.echo(error.trace, err=True, nl=False)
        exit_with_error(str(error), error.exit_code)
    except click.ClickException as error:
        exit_with_error(error.format_message(), EXIT_USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        exit_with_error("interrupted", 130)


def check_output_written() -> None:
    """End with 1 if not all of standard output could be written; without a message if its reader has left."""
    lost = streams.find_dropped_output().get("stdout")
    if lost is not None and lost.last_error == os.strerror(errno.EPIPE):
        sys.exit(EXIT_FAILED)
    if lost is not None:
        exit_with_error(f"{lost.total_bytes} bytes of output could not be written: {lost.last_error}", EXIT_FAILED)


def exit_with_error(message: str, code: int) -> NoReturn:
    """End with a message on standard error."""
    click.echo(f"hvdtrain: error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
