"""The side of RECIPE on which an option belongs: launch options before it, a recipe's and run options after it.

hvdtrain launch -np 2 --epochs 3 digits    run options may be before RECIPE: they are moved
hvdtrain launch digits -np 2               launch options may not be after it: a recipe may have an option of
                                           that name, so the line to write is shown instead
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import click

from hvdtrain.system.errors import UserError, suggest_nearest

GIVEN_ARGUMENTS = "hvdtrain.launch.arguments"  # in click's context: the arguments with run options after RECIPE
ONLY_LAUNCH = ("-np", "-H")  # no recipe can have these


class LaunchCommand(click.Command):
    """A command whose arguments are launch options, RECIPE, and its options, among which run options may come first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = move_run_options(args, option_arity(self))
        ctx.meta[GIVEN_ARGUMENTS] = tuple(args)  # click takes the list apart
        return super().parse_args(ctx, args)


def option_arity(command: click.Command) -> dict[str, bool]:
    """Return the options of a command, each with whether a value follows it."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    arity = {flag: not option.is_flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    return arity | {"-h": False, "--help": False}


def move_run_options(args: Sequence[str], launch: dict[str, bool]) -> list[str]:
    """Return the arguments with the run options that are before RECIPE moved to after it.

    Args:
        args: what follows `hvdtrain launch`.
        launch: its options, as of `option_arity`.

    Raises:
        UserError: an option before RECIPE is neither of the two.
    """
    kept: list[str] = []
    moved: list[str] = []
    place = 0
    while place < len(args) and args[place].startswith("-"):
        flag, equals, _ = args[place].partition("=")
        if flag in launch or flag[:2] in launch or suggest_nearest(flag, launch, list_all=False):
            size = 2 if launch.get(flag) and not equals else 1  # click reports one that is only near
            kept += args[place : place + size]
        else:
            size = 2 if takes_run_value(flag) and not equals else 1
            moved += args[place : place + size]
        place += size
    return [*kept, *args[place : place + 1], *moved, *args[place + 1 :]] if place < len(args) else [*kept, *moved]


def takes_run_value(flag: str) -> bool:
    """Return whether a value follows a run option. Raises UserError if it is not one."""
    from hvdtrain.cli.options import run_option_arity

    arity = run_option_arity()
    if flag not in arity:
        raise UserError(
            f"{flag} before RECIPE is neither a launch option nor a run option; a recipe's own options come after it: "
            f"hvdtrain launch [LAUNCH OPTIONS] RECIPE {flag} ..."
        )
    return arity[flag]


def correct_launch_line(ctx: click.Context, train_args: Sequence[str], flag: str = "") -> str:
    """Return the message that a launch option is after RECIPE, with the line to write; "" if none does.

    Args:
        ctx: of the command.
        train_args: RECIPE and what follows it.
        flag: an option that is not the recipe's, as its parser names it; "" for those that no recipe can have.
    """
    launch = option_arity(ctx.command)
    wrong: list[str] = []
    right: list[str] = list(train_args[:1])
    place = 1
    while place < len(train_args):
        name, equals, _ = train_args[place].partition("=")
        size = 1
        if name in launch and (name in ONLY_LAUNCH or (flag and name.startswith(flag))):
            size = 2 if launch[name] and not equals else 1
            wrong += train_args[place : place + size]
        else:
            right.append(train_args[place])
        place += size
    if not wrong:
        return ""
    before = list(ctx.meta[GIVEN_ARGUMENTS])
    before = before[: len(before) - len(train_args)]
    line = shlex.join(["hvdtrain", "launch", *before, *wrong, *right])
    return f"{wrong[0].partition('=')[0]} goes before RECIPE: {line}"
