"""The parts of a launch line, and the side of RECIPE, script or COMMAND on which an option belongs.

hvdtrain launch -np 2 --epochs 3 digits     run options may be before RECIPE: they are moved after it
hvdtrain launch digits -np 2                launch options may not be after it: a recipe may have an option of
                                            that name, so the line to write is shown instead
hvdtrain launch -np 2 train.py --epochs 3   what follows a program is the program's, as it is
hvdtrain launch -np 2 -- python train.py
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import click

from hvdtrain.system.errors import UserError, suggest_nearest

LAUNCH_LINE = "hvdtrain.launch.line"  # in click's context: the LaunchLine
ONLY_LAUNCH = ("-np", "-H")  # no recipe can have these
USAGE = ("RECIPE [RECIPE OPTIONS] [RUN OPTIONS]", "SCRIPT.py [ARGUMENTS]", "-- COMMAND [ARGUMENTS]")
# What other launchers call them.
FOREIGN_OPTIONS = {
    **dict.fromkeys(("-n", "--np", "--num-proc", "--nproc_per_node", "--nproc-per-node", "--num_processes"), "-np"),
    **dict.fromkeys(("--num-processes", "--ntasks", "--num_gpus"), "-np"),
    **dict.fromkeys(("--host", "--hosts", "--nodelist"), "-H"),
    **dict.fromkeys(("--host-discovery-script",), "--discovery"),
    **dict.fromkeys(("--network-interface", "--network-interfaces"), "--nic"),
    **dict.fromkeys(("--nnodes", "--num_machines", "--node_rank", "--node-rank", "--machine_rank"), "-H a:4,b:4"),
    **dict.fromkeys(("--module", "--no-python", "--no_python"), "-- COMMAND"),
    **dict.fromkeys(("-hostfile", "--machinefile", "-machinefile"), "--hostfile"),
    **{"-x": "--env", "--start-timeout": "the variable HOROVOD_START_TIMEOUT"},
    **dict.fromkeys(("--max_restarts", "--max-restarts", "--reset-limit"), "--relaunch"),
}


@dataclass(frozen=True)
class LaunchLine:
    """What follows `hvdtrain launch`.

    Attributes:
        launch: the launch options.
        run: run options of a recipe that are before it.
        rest: RECIPE, script or COMMAND, and what follows it.
        is_command: `--` is before it.
    """

    launch: tuple[str, ...]
    run: tuple[str, ...]
    rest: tuple[str, ...]
    is_command: bool = False

    def show(self, *words: str, launch: Sequence[str] = ()) -> str:
        """Return the line with the same launch options, and others, and with `words` as what is launched."""
        return shlex.join(["hvdtrain", "launch", *self.launch, *launch, *words])


class LaunchCommand(click.Command):
    """A command whose arguments are launch options, then RECIPE, script or `-- COMMAND`, and what goes to it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        line = split_launch_line(args, option_arity(self))
        ctx.meta[LAUNCH_LINE] = line
        return super().parse_args(ctx, [*line.launch, "--", *line.rest])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for number, what in enumerate(USAGE):
            formatter.write_usage(
                ctx.command_path, f"[LAUNCH OPTIONS] {what}", " " * len("Usage: ") if number else None
            )


def option_arity(command: click.Command) -> dict[str, bool]:
    """Return the options of a command, each with whether a value follows it."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    arity = {flag: not option.is_flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    return arity | {"-h": False, "--help": False}


def split_launch_line(args: Sequence[str], launch: dict[str, bool]) -> LaunchLine:
    """Return the parts of a launch line.

    Args:
        args: what follows `hvdtrain launch`.
        launch: its options, as of `option_arity`.

    Raises:
        UserError: an option before RECIPE is neither a launch option nor a run option.
    """
    kept: list[str] = []
    run: list[str] = []
    place = 0
    while place < len(args) and args[place].startswith("-"):
        flag, equals, _ = args[place].partition("=")
        if flag == "--":
            return LaunchLine(tuple(kept), tuple(run), tuple(args[place + 1 :]), is_command=True)
        if flag in ("-m", "-c"):
            line = LaunchLine(tuple(kept), (), ()).show("--", "python", *args[place:])
            raise UserError(f"{flag} is an option of Python: {line}")
        is_launch = flag in launch or flag[:2] in launch or suggest_nearest(flag, launch, list_all=False)
        if is_launch and flag not in FOREIGN_OPTIONS:
            size = 2 if launch.get(flag) and not equals else 1  # click reports one that is only near
            kept += args[place : place + size]
        else:
            size = 2 if takes_run_value(flag) and not equals else 1
            run += args[place : place + size]
        place += size
    return LaunchLine(tuple(kept), tuple(run), tuple(args[place:]))


def takes_run_value(flag: str) -> bool:
    """Return whether a value follows a run option. Raises UserError if it is not one."""
    from hvdtrain.cli.options import run_option_arity

    arity = run_option_arity()
    if flag in arity:
        return arity[flag]
    text = f"{flag} before RECIPE is neither a launch option nor a run option; "
    if flag in FOREIGN_OPTIONS:
        raise UserError(f"{text}launch has {FOREIGN_OPTIONS[flag]} for it: hvdtrain launch --help")
    raise UserError(
        f"{text}a recipe's own options come after it: hvdtrain launch [LAUNCH OPTIONS] RECIPE {flag} ..., and so do a "
        "program's"
    )


def correct_launch_line(ctx: click.Context, args: Sequence[str], flag: str = "", name: str = "RECIPE") -> str:
    """Return the message that a launch option is after RECIPE, with the line to write; "" if none does.

    Args:
        ctx: of the command.
        args: RECIPE and what follows it, or a script.
        flag: an option that is not the recipe's, as its parser names it; "" for those that no recipe can have.
        name: what the message calls it.
    """
    launch = option_arity(ctx.command)
    wrong: list[str] = []
    right: list[str] = list(args[:1])
    place = 1
    while place < len(args):
        option, equals, _ = args[place].partition("=")
        size = 1
        if option in launch and (option in ONLY_LAUNCH or (flag and option.startswith(flag))):
            size = 2 if launch[option] and not equals else 1
            wrong += args[place : place + size]
        else:
            right.append(args[place])
        place += size
    if not wrong:
        return ""
    line: LaunchLine = ctx.meta[LAUNCH_LINE]
    return f"{wrong[0].partition('=')[0]} goes before {name}: {line.show(*right, launch=wrong)}"
