"""The run options: how a recipe is trained, apart from what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hvdtrain.recipe.base import Recipe, check_finite, make_from_values, option, option_fields
from hvdtrain.system.errors import UserError

DEFAULT_HANG_LIMIT = 600.0  # seconds


@dataclass(kw_only=True)
class RunOptions:
    """Run options with their defaults; the command line and `hvdtrain.fit` take them by these names."""

    run_dir: Path | None = option(None, "run folder; default: runs/RECIPE-DATE-TIME")
    resume: bool = option(False, "go on from the newest checkpoint in --run-dir; at step 0 if it has none yet")
    steps: int | None = option(None, "train this many steps in all, instead of --epochs")
    micro_batch: int | None = option(None, "most examples per rank in one pass; a rank's part takes several if larger")
    batch_per_rank: int | None = option(None, "weak scaling: a global batch of this many examples times the ranks")
    scale_lr: Literal["none", "linear", "sqrt"] = option("none", "with --batch-per-rank: lr times ranks, or their root")
    seed: int = option(0, "seed of the weights, the sample order and all other randomness")
    amp: Literal["off", "bf16", "fp16"] = option("off", "automatic mixed precision")
    clip_norm: float | None = option(None, "clip the norm of the reduced gradient to this")
    ema: float | None = option(None, "evaluate an exponential moving average of the weights with this decay")
    compile: bool = option(False, "compile the model (torch.compile)")
    deterministic: bool = option(False, "the same bits on any number of ranks, and when that changes on the way")
    virtual_shards: int = option(
        12, "with --deterministic: parts of the global batch whose gradients are computed alone; part of the maths"
    )
    compression: str = option(
        "none",
        "gradient compression: none, fp16, bf16, int8, onebit, qsgd:4bit, topk:0.01, randomk:0.25, powersgd:4; "
        "with options, e.g. powersgd:4,warmup=100,min=8192; auto: measured while training, none included",
    )
    exchange: Literal["bucketed", "horovod"] = option("bucketed", "flat buckets, or Horovod's own, for comparison")
    bucket_mib: float | None = option(
        None, "MiB of gradients that are sent together; default: 8, between GPUs 25; the first bucket has 1 at most"
    )
    checkpoint_residuals: Literal["sum", "exact"] = option(
        "sum", "save compression's residuals summed, for any number of ranks, or also each rank's own"
    )
    checkpoint_every: int | None = option(None, "steps between checkpoints; default: once an epoch. Also at the end")
    keep: int = option(3, "checkpoints to keep, besides the best of those at whose step there was an evaluation")
    eval_every: int | None = option(None, "steps between evaluations; default: once an epoch. Also at the end")
    log_every: int = option(10, "steps between rows of metrics.jsonl")
    ledger: bool = option(True, "write down which examples each step consumed, for `hvdtrain ledger verify`")
    skip_nonfinite: int = option(0, "steps with a loss that is not finite to skip before giving up")
    device: Literal["cpu", "cuda"] | None = option(None, "default: cuda if there is one")
    threads: int | None = option(
        None,
        "CPU threads per rank; default: OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, or the host's cores (a container's CPU "
        "quota), divided among its ranks; with --deterministic 1, and part of the maths",
    )
    workers: int = option(0, "processes per rank that load data; 0: the rank itself")
    diagnose: bool = option(
        False,
        "compare ranks every --log-every steps, 10 at least: whom the others wait for and why, and whether their "
        "weights are the same; the run ends where they are not",
    )
    hang_limit: float = option(
        DEFAULT_HANG_LIMIT,
        "end a rank that spends so many seconds in one batch, one score or one update, and say in what; an elastic run "
        "replaces it. Three times as long before the first step, in a checkpoint, or waiting for others; 0: no limit",
    )
    quiet: bool = option(False, "no progress and no plan on the terminal")

    def __post_init__(self) -> None:
        at_least_one = ("steps", "micro_batch", "batch_per_rank", "checkpoint_every", "eval_every", "threads")
        for name in (*at_least_one, "keep", "log_every", "virtual_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.bucket_mib is not None and not self.bucket_mib > 0:
            raise ValueError(f"--bucket-mib is {self.bucket_mib}; it must be above 0")
        for name in ("seed", "workers", "skip_nonfinite", "hang_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if self.seed >= 1 << 64:
            raise ValueError(f"--seed is {self.seed}; it must be below 2^64")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"--clip-norm is {self.clip_norm}; it must be above 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"--ema is {self.ema}; a decay lies between 0 and 1, for example 0.999")
        if self.resume and self.run_dir is None:
            raise ValueError("--resume needs --run-dir: the folder of the run to go on with")
        if self.scale_lr != "none" and self.batch_per_rank is None:
            raise ValueError(f"--scale-lr {self.scale_lr} goes with --batch-per-rank; a fixed --batch-size needs none")
        if self.deterministic:
            self._check_deterministic()

    def _check_deterministic(self) -> None:
        if self.compression != "none":
            raise ValueError(
                f"--deterministic with --compression {self.compression}: what it loses depends on the ranks"
            )
        if self.exchange != "bucketed":
            raise ValueError(f"--deterministic with --exchange {self.exchange}: its sums depend on the ranks")
        if self.batch_per_rank is not None:
            raise ValueError("--deterministic with --batch-per-rank: the batch depends on the ranks; give --batch-size")
        if self.compile:
            raise ValueError("--deterministic with --compile: what is compiled depends on what a rank sees first")


def check_elastic_options(given: Mapping[str, Any]) -> None:
    """Raise UserError for options that would not mean the same in each world of an elastic run."""
    if given.get("batch_per_rank"):
        raise UserError("--batch-per-rank makes the batch depend on the ranks; an elastic run takes --batch-size")
    from hvdtrain.compression.spec import parse_compression  # with which torch comes

    compression = given.get("compression", "none")
    if parse_compression(compression).momentum:
        raise UserError(f"--compression {compression}: no momentum in an elastic run, which may come down to one rank")


def split_options(cls: type[Recipe], given: dict[str, Any]) -> tuple[Recipe, RunOptions]:
    """A recipe and run options from one dict of values. Raises UserError where they refuse a value."""
    own = {key: value for key, value in given.items() if key in RunOptions.__dataclass_fields__}
    recipe: Recipe = make_from_values(cls, {key: value for key, value in given.items() if key not in own})
    check_recipe_values(recipe)
    return recipe, make_from_values(RunOptions, own)


def check_recipe_values(recipe: Recipe) -> None:
    """Raise UserError for a number of epochs or a batch size below 1, and for numbers that are not finite."""
    for field in option_fields(type(recipe)):
        check_finite(field, getattr(recipe, field.name))
    for name in ("epochs", "batch_size"):
        if getattr(recipe, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(recipe, name)}; it must be at least 1")
