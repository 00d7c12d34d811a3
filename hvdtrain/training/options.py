"""The run options: how a recipe is trained, apart from what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import Recipe, refuse_two_schedules
from hvdtrain.recipe.options import (
    OptionValues,
    check_number,
    flatten_options,
    make_from_values,
    option,
    option_fields,
    option_group,
)
from hvdtrain.recipe.shares import EVEN, parse_weights
from hvdtrain.system.errors import UserError

DEFAULT_HANG_LIMIT = 600.0  # seconds
R = TypeVar("R", bound=Recipe)


@dataclass(kw_only=True)
class CheckpointOptions:
    """The run folder, and what is saved in it."""

    run_dir: Path | None = option(None, "run folder; default: runs/RECIPE-DATE-TIME")
    resume: bool = option(False, "continue from the newest checkpoint in --run-dir; from step 0 if it has none yet")
    every: int | None = option(
        None, "steps between checkpoints; default: once an epoch. Also at the end", name="checkpoint_every", at_least=1
    )
    keep: int = option(
        3, "checkpoints to keep, and the best of those at whose step there was an evaluation", at_least=1
    )
    init_from: Path | None = option(
        None,
        "begin with the weights of a file: a checkpoint's folder or state, a torch state dict, or .safetensors; "
        "not read if there is a checkpoint to resume",
    )
    init_partial: bool = option(False, "with --init-from: load the tensors that fit, and leave out the others")
    ledger: bool = option(True, "record which examples each step consumed, for `hvdtrain ledger verify`")

    def __post_init__(self) -> None:
        if self.resume and self.run_dir is None:
            raise ValueError("--resume needs --run-dir: the folder of the run to continue")
        if self.init_partial and self.init_from is None:
            raise ValueError("--init-partial needs --init-from: the file whose weights to begin with")


@dataclass(kw_only=True)
class ReportOptions:
    """What is measured and reported while training."""

    eval_every: int | None = option(
        None, "steps between evaluations; default: once an epoch. Also at the end", at_least=1
    )
    log_every: int = option(10, "steps between rows of metrics.jsonl", at_least=1)
    loggers: tuple[str, ...] = option(
        ("tensorboard",),
        "what receives rows and the summary besides the run folder's files; several: a,b",
        name="logger",
    )
    diagnose: bool = option(
        False,
        "compare ranks every --log-every steps, 10 at least: which rank the others wait for and why, and whether their "
        "weights are the same; the run ends if they are not",
    )
    quiet: bool = option(False, "no progress and no plan on the terminal")


@dataclass(kw_only=True)
class FaultOptions:
    """What is done about steps that fail and ranks that hang."""

    skip_nonfinite: int = option(0, "steps with a loss that is not finite to skip before giving up", at_least=0)
    hang_limit: float = option(
        DEFAULT_HANG_LIMIT,
        "end a rank that spends this many seconds in one batch, one score or one update, and report in which; an "
        "elastic run replaces it. Three times as long before the first step, in a checkpoint, or waiting for others; "
        "0: no limit",
        at_least=0,
    )


@dataclass(kw_only=True)
class RunOptions(StepOptions):
    """Run options with their defaults; the command line and `hvdtrain.fit` take them by their flat names."""

    checkpoints: CheckpointOptions = option_group(CheckpointOptions, "Run folder and checkpoints")
    reports: ReportOptions = option_group(ReportOptions, "Reports")
    faults: FaultOptions = option_group(FaultOptions, "Faults and elastic runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pipeline.stages > 1 and self.checkpoints.init_from is not None:
            raise ValueError(
                f"{self.pipeline.flag} with --init-from {self.checkpoints.init_from}: a rank has a part of the model "
                "only; save a checkpoint by a run of one step without --stages, and --resume it"
            )
        if self.service.server is not None and self.reports.diagnose:
            raise ValueError(
                f"--server {self.service.server} with --diagnose: it compares ranks in their steps; leave one out"
            )


def check_elastic_options(given: OptionValues) -> None:
    """Raise UserError for options that would not mean the same in each world of an elastic run."""
    if given.get("batch_per_rank"):
        raise UserError("--batch-per-rank makes the batch depend on the ranks; an elastic run takes --batch-size")
    if (given.get("server") or 1) > 1:
        raise UserError(
            f"--server {given['server']} in an elastic run: a lost server would take its part of the model along; use "
            "--server 1"
        )
    shares = given.get("shares", EVEN)
    if parse_weights(shares) is not None:
        raise UserError(f"--shares {shares} is for the ranks of one world; an elastic run takes --shares measured")
    check_elastic_division(given)
    if given.get("shard") == "optimizer" and given.get("mirror") == "0":
        raise UserError(
            "--mirror 0 with --shard optimizer: a rank that is lost would take its part of the optimizer's "
            "state along; leave --mirror out of an elastic run"
        )
    if given.get("shard") == "optimizer" and given.get("compression", "none") != "none":
        raise UserError(
            f"--shard optimizer with --compression {given['compression']}: mirrors do not encode; leave out one "
            "of them in an elastic run"
        )
    from hvdtrain.compression.spec import parse_compression  # with which torch comes

    compression = given.get("compression", "none")
    if parse_compression(compression).momentum:
        raise UserError(f"--compression {compression}: no momentum in an elastic run, which may come down to one rank")


def check_elastic_division(given: OptionValues) -> None:
    """Raise UserError for options of models that ranks hold together, and that are not exact in an elastic run."""
    shards_model, tensor = given.get("shard") == "model", given.get("tensor", 1)
    if shards_model and not given.get("shard_ranks"):
        raise UserError(
            "--shard model in an elastic run: hosts may come with other numbers of slots; add --shard-ranks N, the "
            "ranks of a replica"
        )
    if (shards_model or tensor > 1) and given.get("amp") == "fp16":
        flag = "--shard model" if shards_model else f"--tensor {tensor}"
        raise UserError(
            f"{flag} with --amp fp16: ranks find an overflow together, in an update that a lost rank would leave "
            "half made; use bf16 in an elastic run"
        )


def split_options(cls: type[R], given: OptionValues) -> tuple[R, RunOptions]:
    """Make a recipe and run options from one dict of values. Raises UserError if they reject a value."""
    return make_recipe(cls, given), make_run_options(given)


def make_recipe(cls: type[R], given: OptionValues) -> R:
    """Make a recipe from those of the values that are not run options. Raises UserError if it rejects one."""
    run_names = {field.name for field in option_fields(RunOptions)}
    recipe = make_from_values(cls, {name: value for name, value in given.items() if name not in run_names})
    check_recipe_values(recipe)
    return recipe


def make_run_options(given: OptionValues) -> RunOptions:
    """Make run options from those of the values that are. Raises UserError if they reject one."""
    run_names = {field.name for field in option_fields(RunOptions)}
    return make_from_values(RunOptions, {name: given[name] for name in given if name in run_names})


def check_recipe_values(recipe: Recipe) -> None:
    """Raise UserError for numbers out of bounds or not finite, and for a schedule next to `lr_factor`."""
    values = flatten_options(recipe)
    for field in option_fields(type(recipe)):
        if field.name == "schedule" and recipe.schedule != field.default:
            refuse_two_schedules(type(recipe), recipe.schedule)
        check_number(field, values[field.name])
