"""What benchmarks of training are given: the recipe, its options, and what to compare."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import flag_of, option_fields
from hvdtrain.recipe.step_options import DataOptions
from hvdtrain.system.errors import UserError
from hvdtrain.training.options import RunOptions, split_options

if TYPE_CHECKING:
    from hvdtrain.bench.ways import WaysPlan
    from hvdtrain.bench.workload import BenchmarkPlan
    from hvdtrain.cli.options import TrainArguments

# The run options that a benchmark uses, besides the recipe's own.
USED_OPTIONS = {"batch_size", "batch_per_rank", "lr", "seed", "amp", "device", "threads"}
UNUSED_OPTIONS = ({field.name for field in option_fields(RunOptions)} | {"epochs", "schedule"}) - USED_OPTIONS

# Of a run that is measured, what the benchmark itself decides.
SET_BY_WAYS = {
    "run_dir",
    "resume",
    "checkpoint_every",
    "eval_every",
    "log_every",
    "logger",
    "quiet",
    "diagnose",
}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class WorkloadArguments:
    """The arguments of a benchmark that trains.

    Attributes:
        specs: methods of compression to measure; empty: the benchmark's own.
        steps: to measure of each method.
        json_path: where to write the rows; None: nowhere.
        recipe: to train; None: a ResNet-18.
        args: options of the recipe and of the run.
    """

    specs: tuple[str, ...]
    steps: int
    json_path: Path | None
    recipe: str | None
    args: tuple[str, ...]

    def check_arguments(self) -> None:
        """Check what is to be compressed and trained. Raises UserError."""
        from hvdtrain.compression.spec import parse_compression

        for text in self.specs:
            if parse_compression(text).method == "auto":
                raise UserError(f"compression {text!r} measures methods itself during training; expected one method")
        load_workload(self.recipe, self.args)

    def make_plan(self, default_specs: Sequence[str]) -> BenchmarkPlan:
        """Return what the benchmark does. Imports torch."""
        from hvdtrain.bench.workload import BenchmarkPlan

        recipe, options = load_workload(self.recipe, self.args)
        return BenchmarkPlan(recipe, options, self.specs or default_specs, self.steps, self.json_path)


def add_workload_options(compression_help: str) -> Callable[[F], F]:
    """Return a decorator that adds the options of WorkloadArguments to a command, which gets them as `workload`."""
    options = (
        click.option("--compression", "specs", multiple=True, metavar="SPEC", help=compression_help),
        click.option(
            "--steps", type=click.IntRange(min=2), default=20, show_default=True, metavar="N", help="Steps to measure."
        ),
        click.option(
            "--json",
            "json_path",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Also write the rows as JSON.",
        ),
        click.argument("recipe", required=False),
        click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE OPTIONS] [RUN OPTIONS]"),
    )

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            given = {field.name: kwargs.pop(field.name) for field in fields(WorkloadArguments)}
            return function(*args, workload=WorkloadArguments(**given), **kwargs)

        for option in reversed(options):
            command = option(command)
        return command  # type: ignore[return-value]

    return decorate


def load_workload(recipe: str | None, args: tuple[str, ...]) -> tuple[Recipe, RunOptions]:
    """Return what is to be trained.

    Raises:
        UserError: an option is unknown, or a benchmark does not use it.
    """
    from hvdtrain.cli import options
    from hvdtrain.cli.train import load_arguments

    if recipe is None:
        from hvdtrain.bench.workload import ResNet18

        return ResNet18(), RunOptions(data=DataOptions(batch_per_rank=16))
    arguments = load_arguments([recipe, *args])
    for name in arguments.given_options:
        if name in UNUSED_OPTIONS:
            flags = ", ".join(map(flag_of, sorted(USED_OPTIONS)))
            raise UserError(f"{flag_of(name)} is not used by benchmarks; expected the recipe's own options, or {flags}")
    options.check_parsed_arguments(arguments)
    return split_options(arguments.recipe_class, arguments.given_options)


@dataclass(frozen=True)
class WayArguments:
    """The arguments of `bench step --way`.

    Attributes:
        ways: run options and options of the recipe, each as one text.
        turns: how often each way is measured.
        workload: the rest.
    """

    ways: tuple[str, ...]
    turns: int
    workload: WorkloadArguments

    def check_arguments(self) -> None:
        """Check each way as `hvdtrain train` does before the first step. Raises UserError."""
        from hvdtrain.cli.options import check_parsed_arguments

        if self.workload.specs:
            raise UserError("--compression and --way exclude each other: give --way '--compression SPEC'")
        if len(set(self.ways)) < max(2, len(self.ways)):
            raise UserError("--way: expected two different ways or more; --way '' is RECIPE with the options after it")
        for way in self.ways:
            try:
                arguments = self.parse_way(way)
                for name in arguments.given_options:
                    if name in SET_BY_WAYS:
                        raise UserError(f"{flag_of(name)} is not used by benchmarks: leave it out")
                check_parsed_arguments(arguments)
            except UserError as error:
                raise UserError(f"--way {way!r}: {error}") from error

    def make_plan(self) -> WaysPlan:
        """Return what the benchmark does. Imports torch."""
        from hvdtrain.bench.ways import WaysPlan

        parsed = {way: self.parse_way(way) for way in self.ways}
        first = parsed[self.ways[0]]
        return WaysPlan(
            recipe_class=first.recipe_class,
            name=first.name,
            ways={way: arguments.given_options for way, arguments in parsed.items()},
            steps=self.workload.steps,
            turns=self.turns,
            json_path=self.workload.json_path,
        )

    def parse_way(self, way: str) -> TrainArguments:
        """Return the recipe with the options of all ways and those of this one. Raises UserError."""
        from hvdtrain.cli.options import parse_arguments
        from hvdtrain.cli.train import load_arguments

        try:
            words = [*self.workload.args, *shlex.split(way)]
        except ValueError as error:
            raise UserError(f"{error}".lower()) from error
        if self.workload.recipe is not None:
            return load_arguments([self.workload.recipe, *words])
        from hvdtrain.bench.workload import ResNet18

        return parse_arguments(ResNet18, "resnet18", words)
