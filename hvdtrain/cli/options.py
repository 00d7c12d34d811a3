"""Dataclass fields as command-line options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hvdtrain.recipe.base import OptionField, Recipe, option_fields
from hvdtrain.recipe.registry import split_recipe_spec
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.training import schedule
from hvdtrain.training.options import RunOptions, split_options

CLICK_TYPES: dict[type, Any] = {int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL}


def make_click_option(field: OptionField) -> click.Option:
    """A field as a click option; a bool becomes --name/--no-name."""
    flag = field.flag if field.type is not bool else f"{field.flag}/--no-{field.flag[2:]}"
    kind = click.Choice(field.choices) if field.choices else CLICK_TYPES.get(field.type, click.Path(path_type=Path))
    return click.Option([field.name, flag], type=kind, default=None, help=_format_help(field))


def _format_help(field: OptionField) -> str:
    shown = field.default if field.type is not bool else ("on" if field.default else "off")
    return field.help if field.default is None else f"{field.help}  [{shown}]"


class TrainCommand(click.Command):
    """The options of one recipe, with a help that lists them apart from the run options."""

    def __init__(self, name: str, recipe: type[Recipe], **kwargs: Any) -> None:
        common = option_fields(Recipe)
        self.recipe_options = [f for f in option_fields(recipe) if f.name not in {c.name for c in common}]
        # Epochs, batch size, learning rate and schedule are the recipe's to default, and every run's to set.
        self.run_options = [f for f in option_fields(recipe) if f.name in {c.name for c in common}] + option_fields(
            RunOptions
        )
        clash = {f.name for f in self.recipe_options} & {f.name for f in self.run_options}
        if clash:
            raise UserError(f"{recipe.__name__}.{clash.pop()} is a run option; name the recipe's option otherwise")
        options = [make_click_option(f) for f in [*self.recipe_options, *self.run_options]]
        flags = ["--help", *(flag for option in options for flag in (*option.opts, *option.secondary_opts))]
        twice = [flag for flag in flags if flags.count(flag) > 1]
        if twice:
            raise UserError(f"two options of {recipe.__name__} are called {twice[0]}; rename the field of one")
        super().__init__(name, params=options, **kwargs)  # type: ignore[arg-type]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in (("Recipe options", self.recipe_options), ("Run options", self.run_options)):
            names = {f.name for f in group}
            records = [p.get_help_record(ctx) for p in self.params if p.name in names]
            if records:
                with formatter.section(title):
                    formatter.write_dl([record for record in records if record])


@dataclass(frozen=True)
class TrainArguments:
    """A parsed command line of `hvdtrain train`."""

    recipe_class: type[Recipe]
    name: str  # of the recipe, as the run folder records it
    given_options: dict[str, Any]  # only what was given


def recipe_name(spec: str) -> str:
    """`digits`, `digits:Wide`, `my/recipe.py:Class` as a name without folders."""
    where, cls = split_recipe_spec(spec)
    stem = where.rsplit("/", 1)[-1].removesuffix(".py")
    return f"{stem}:{cls}" if cls else stem


def parse_arguments(cls: type[Recipe], spec: str, args: list[str]) -> TrainArguments:
    """Parse what follows RECIPE. Raises UserError for an unknown option or a wrong value, naming the nearest right one.

    `--help` prints the help and raises click's Exit.
    """
    command = TrainCommand(f"hvdtrain train {spec}", cls, help=cls.__doc__)
    try:
        with command.make_context(command.name, list(args)) as context:
            given = {key: value for key, value in context.params.items() if value is not None}
    except click.NoSuchOption as error:
        names = [flag for option in command.params for flag in (*option.opts, *option.secondary_opts)]
        raise UserError(f"no option {error.option_name}{suggest_nearest(error.option_name, names)}") from error
    except click.BadParameter as error:
        option = error.param.opts[0] if error.param else ""
        raise UserError(f"{option}: {error.message.rstrip('.')}") from error
    except click.UsageError as error:
        raise UserError(error.message) from error
    for one, other in (("epochs", "steps"), ("batch_size", "batch_per_rank")):
        if one in given and other in given:
            flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise UserError(f"{' and '.join(flags)} exclude each other: give one")
    return TrainArguments(cls, recipe_name(spec), given)


def check_parsed_arguments(arguments: TrainArguments) -> None:
    """Find what a user can have got wrong, without data or Horovod. Raises UserError."""
    from hvdtrain.compression import spec
    from hvdtrain.recipe.framework import check_framework

    check_framework(arguments.recipe_class)
    recipe, run = split_options(arguments.recipe_class, arguments.given_options)
    schedule.parse_schedule(recipe.schedule, 1000, 10)
    spec.parse_compression(run.compression)
