"""Dataclass fields as command-line options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hvdtrain.cli.config_file import CONFIG_SECTION, make_config_options, read_config_files
from hvdtrain.recipe import schedule
from hvdtrain.recipe.base import Recipe, check_methods, refuse_two_schedules
from hvdtrain.recipe.option_types import SeveralValues, join_values, parse_texts
from hvdtrain.recipe.options import OptionField, OptionValues, convert_value, flag_of, option_fields
from hvdtrain.recipe.registry import split_recipe_spec
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.training.config import override_options
from hvdtrain.training.logger import LOGGERS
from hvdtrain.training.options import RunOptions, split_options

CLICK_TYPES: dict[type, Any] = {int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL}
CLICK_NAMES = {int: "INTEGER", float: "FLOAT", str: "TEXT", bool: "BOOLEAN"}


def make_click_option(field: OptionField) -> click.Option:
    """Return a field as a click option; a bool becomes --name/--no-name, several values a list with commas."""
    kind = click.Choice(field.choices) if field.choices else CLICK_TYPES.get(field.type, click.Path(path_type=Path))
    if field.multiple:
        option = click.Option(["value", field.flag], type=click.STRING, multiple=True, metavar=_name_values(field))
    elif field.type is bool:
        option = click.Option(["value", f"{field.flag}/--no-{field.flag[2:]}"], type=click.BOOL, default=None)
    else:
        option = click.Option(["value", field.flag], type=kind, default=None)
    option.name = field.name  # not an identifier, if it has a dot
    return option


def _name_values(field: OptionField) -> str:
    """Return the placeholder of several values in the help: `INTEGER,...`."""
    assert isinstance(field.kind, SeveralValues)
    names = [
        f"[{'|'.join(kind.choices)}]" if kind.choices else CLICK_NAMES.get(kind.type, "PATH")
        for kind in field.kind.items
    ]
    return ",".join(names) if field.kind.is_fixed else f"{names[0]},..."


def _format_help(field: OptionField) -> str:
    shown = field.default if field.type is not bool or field.multiple else ("on" if field.default else "off")
    if field.multiple and shown is not None:
        shown = join_values(shown) or None
    text = field.help() if callable(field.help) else field.help
    return text if shown is None else f"{text}  [{shown}]"


class TrainCommand(click.Command):
    """The options of one recipe and of every run; its help lists them by the sections of `RunOptions`."""

    def __init__(self, name: str, recipe: type[Recipe], **kwargs: Any) -> None:
        # Epochs, batch size, learning rate and schedule have defaults of the recipe, and sections of every run.
        of_recipe, of_run = option_fields(recipe), option_fields(RunOptions)
        clash = {field.name for field in of_recipe} & {field.name for field in of_run}
        if clash:
            raise UserError(f"{recipe.__name__}.{clash.pop()} is a run option; rename the recipe's option")
        self.fields = [*of_recipe, *of_run]
        options = [*map(make_click_option, self.fields), *make_config_options()]
        flags = ["--help", "-h", *(flag for option in options for flag in (*option.opts, *option.secondary_opts))]
        twice = [flag for flag in flags if flags.count(flag) > 1]
        if twice:
            raise UserError(f"two options of {recipe.__name__} are called {twice[0]}; rename the field of one")
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        super().__init__(name, params=options, context_settings=settings, **kwargs)  # type: ignore[arg-type]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for option, field in zip(self.params, self.fields, strict=False):  # click adds --help at the end
            if isinstance(option, click.Option):
                option.help = _format_help(field)
        records = {str(option.name): option.get_help_record(ctx) for option in self.params}
        # The recipe's own options have no section and come first.
        for section in dict.fromkeys(["", *(field.section for field in option_fields(RunOptions))]):
            listed = [records[field.name] for field in self.fields if field.section == section]
            if listed:
                with formatter.section(section or "Recipe options"):
                    formatter.write_dl([record for record in listed if record])
        with formatter.section(CONFIG_SECTION):
            formatter.write_dl([record for option in make_config_options() if (record := records[str(option.name)])])


def run_option_arity() -> dict[str, bool]:
    """Return the options that every recipe has, each with whether a value follows it."""
    fields = [*option_fields(Recipe), *option_fields(RunOptions)]
    takes_value = {field.flag: field.multiple or field.type is not bool for field in fields}
    takes_value |= {option.opts[0]: not option.is_flag for option in make_config_options()}
    return takes_value | {f"--no-{field.flag[2:]}": False for field in fields if not takes_value[field.flag]}


def split_recipe(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Find RECIPE, which run options may come before; return it and all options. None: help on every recipe's options.

    Raises UserError if RECIPE is missing, or an option before it is not one of every run.
    """
    takes_value = run_option_arity()
    place = 0
    while place < len(args) and args[place].startswith("-"):
        flag, equals, _ = args[place].partition("=")
        if flag in ("-h", "--help"):
            takes_value[flag] = False
        elif flag not in takes_value:
            raise UserError(
                f"{flag} before RECIPE is not a run option{suggest_nearest(flag, takes_value, list_all=False)}; "
                f"a recipe's own options come after it: hvdtrain train RECIPE {flag} ..."
            )
        place += 2 if takes_value[flag] and not equals else 1
    if place < len(args):
        return args[place], [*args[:place], *args[place + 1 :]]
    if {"-h", "--help"} & set(args):
        return None, []
    raise UserError("RECIPE is missing; `hvdtrain list` shows those found")


@dataclass(frozen=True)
class TrainArguments:
    """A parsed command line of `hvdtrain train`."""

    recipe_class: type[Recipe]
    name: str  # of the recipe, as the run folder records it
    given_options: OptionValues  # only what was given, on the command line or in a file
    print_config: bool = False


def recipe_name(spec: str) -> str:
    """Return `digits`, `digits:Wide` or `my/recipe.py:Class` as a name without folders."""
    where, cls = split_recipe_spec(spec)
    stem = where.rsplit("/", 1)[-1].removesuffix(".py")
    return f"{stem}:{cls}" if cls else stem


def collect_given(fields: Sequence[OptionField], values: OptionValues) -> OptionValues:
    """Return the values of the options that were given. Raises UserError for a wrong one in a list of values."""
    given: dict[str, object] = {}
    for field in fields:
        value = values[field.name]
        if value is None or value == ():
            continue
        is_several = isinstance(field.kind, SeveralValues)
        given[field.name] = parse_texts(field.kind, field.flag, value) if is_several else value  # type: ignore[arg-type]
        convert_value(field, given[field.name])
    return given


def parse_arguments(cls: type[Recipe], spec: str, args: list[str]) -> TrainArguments:
    """Parse what follows RECIPE. Raises UserError for an unknown option or a wrong value, naming the nearest right one.

    `--help` prints the help and raises click's Exit.
    """
    command = TrainCommand(f"hvdtrain train {spec}", cls, help=cls.__doc__)
    try:
        with command.make_context(command.name, list(args)) as context:
            given, files = collect_given(command.fields, context.params), context.params["config"]
            print_config = context.params["print_config"]
    except click.NoSuchOption as error:
        names = [flag for option in command.params for flag in (*option.opts, *option.secondary_opts)]
        near = suggest_nearest(error.option_name, names, list_all=False)
        raise UserError(f"no option {error.option_name}{near or f'; {command.name} --help lists them'}") from error
    except click.BadParameter as error:
        option = error.param.opts[0] if error.param else ""
        raise UserError(f"{option}: {error.message.rstrip('.')}") from error
    except click.UsageError as error:
        raise UserError(error.message) from error
    for one, other in (("epochs", "steps"), ("batch_size", "batch_per_rank")):
        if one in given and other in given:
            flags = [flag_of(name) for name in (one, other)]
            raise UserError(f"{' and '.join(flags)} exclude each other: give one")
    if "schedule" in given:
        refuse_two_schedules(cls, given["schedule"])
    given = override_options(read_config_files(files, cls), given)
    return TrainArguments(cls, recipe_name(spec), given, print_config)


def check_parsed_arguments(arguments: TrainArguments) -> None:
    """Raise UserError for every mistake that can be found without data or Horovod."""
    from hvdtrain.compression import spec
    from hvdtrain.recipe.framework import find_framework

    find_framework(arguments.recipe_class)
    check_methods(arguments.recipe_class)
    recipe, run = split_options(arguments.recipe_class, arguments.given_options)
    schedule.parse_schedule(recipe.schedule, 1000, 10)
    spec.parse_compression(run.compression.spec)
    for name in run.reports.loggers:
        LOGGERS.get(name)
