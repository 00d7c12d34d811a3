"""What has to be settled before the first step: devices, the run folder, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

from hvdtrain import __version__
from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.ledger.writer import MOST, Ledger, numbered
from hvdtrain.recipe.framework import StepOptions
from hvdtrain.recipe.source import RecipeSource
from hvdtrain.recipe.source_copy import write_copy
from hvdtrain.system import cpus
from hvdtrain.system.cpus import Threads
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import FOR_OWNER, trouble, write_json
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import Plan
from hvdtrain.training.rows import find_ledger_gap

PACKAGES = ("torch", "torchvision", "horovod", "numpy", "mpi4py")


def step_options(options: RunOptions, world: World) -> StepOptions:
    """The framework's options, with the number of threads resolved on this host."""
    return StepOptions(
        seed=options.seed,
        device=options.device,
        threads=resolve_threads(options, world.local_size).count,
        workers=options.workers,
        micro_batch=options.micro_batch,
        amp=options.amp,
        clip_norm=options.clip_norm,
        ema=options.ema,
        compile=options.compile,
        compression=options.compression,
        exchange=options.exchange,
        bucket_mib=options.bucket_mib,
        exact_residuals=options.checkpoint_residuals == "exact",
        shards=options.virtual_shards if options.deterministic else None,
    )


def resolve_threads(options: RunOptions, local_size: int) -> Threads:
    """How many threads each rank of this host uses, and who chose that."""
    if options.threads is not None:
        return Threads(options.threads, "--threads")
    # Sums within an operation depend on the number of threads.
    return Threads(1, "--deterministic") if options.deterministic else cpus.choose_threads(local_size)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Rank 0 writes config.json, once nothing is left to refuse. Raises UserError on all ranks if it cannot."""

    def write() -> None:
        try:
            write_json(folder / "config.json", config, FOR_OWNER)  # options may hold secrets
        except OSError as error:
            raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error

    collectives.on_root("config.written", write)


def copy_source(folder: Path, source: RecipeSource) -> str | None:
    """Rank 0 writes the recipe's files to RUN_DIR/source/; what has changed in them since the run began, in a line.

    Raises UserError on all ranks if they cannot be written.
    """

    def write() -> str | None:
        try:
            return write_copy(folder, source)
        except OSError as error:
            raise UserError(trouble("the recipe's source", folder, error)) from error

    return collectives.on_root("source.written", write)


def open_ledger(known: Ledger | None, options: RunOptions, plan: Plan, at: Position, folder: Path) -> Ledger:
    """This rank's ledger of the steps after `at`, which rank 0 writes; of an earlier world's, if it is known.

    Raises UserError for a batch too large for it, and on all ranks if it cannot be written when the run starts.
    """
    if options.ledger and plan.batch_size > MOST:
        raise UserError(f"a ledger cannot tell {plan.batch_size} examples a step, {MOST} at most: add --no-ledger")
    ledger = known or Ledger(options.seed, plan.examples, plan.batch_size, at.step)
    ledger.rollback(at.step)

    def begin_segment() -> None:
        if not options.ledger and (known is not None or not numbered(folder / "ledger")):
            return
        if known is None and options.ledger and (gap := find_ledger_gap(folder / "ledger", at.step)):
            print(f"hvdtrain: warning: {gap}", file=sys.stderr, flush=True)
        # The first segment shows whether it can be written; a try that makes no step leaves no further one.
        again = options.ledger and bool(numbered(folder / "ledger"))
        ledger.open_for_writing(folder / "ledger", at_first_row=again)
        if known is None and ledger.error is not None:
            raise UserError(trouble("the ledger", folder, ledger.error))
        if not options.ledger:  # the segment, which has no rows, takes back the steps that are undone
            ledger.close()

    collectives.on_root("ledger", begin_segment)
    return ledger


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    found = {"hvdtrain": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
