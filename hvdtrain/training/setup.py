"""What has to be settled before the first step: devices, the run folder, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

from hvdtrain import __version__
from hvdtrain.comm import collectives
from hvdtrain.ledger.writer import MAX_STEP_EXAMPLES, Ledger, find_segments
from hvdtrain.recipe.source import RecipeSource
from hvdtrain.recipe.source_copy import write_copy
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import PRIVATE_MODE, write_error_text, write_json
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.rows import find_ledger_gap

REPORTED_PACKAGES = ("torch", "torchvision", "horovod", "numpy", "mpi4py")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Rank 0 writes config.json, once nothing is left to refuse. Raises UserError on all ranks if it cannot."""

    def write_on_root() -> None:
        try:
            write_json(folder / "config.json", config, PRIVATE_MODE)  # options may hold secrets
        except OSError as error:
            raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error

    collectives.on_root("config.written", write_on_root)


def copy_source(folder: Path, source: RecipeSource) -> str | None:
    """Rank 0 writes the recipe's files to RUN_DIR/source/; what has changed in them since the run began, in a line.

    Raises UserError on all ranks if they cannot be written.
    """

    def write_files() -> str | None:
        try:
            return write_copy(folder, source)
        except OSError as error:
            raise UserError(write_error_text("the recipe's source", folder, error)) from error

    return collectives.on_root("source.written", write_files)


def open_ledger(known: Ledger | None, options: RunOptions, plan: TrainingPlan, at: Position, folder: Path) -> Ledger:
    """This rank's ledger of the steps after `at`, which rank 0 writes; of an earlier world's, if it is known.

    Raises UserError for a batch too large for it, and on all ranks if it cannot be written when the run starts.
    """
    if options.checkpoints.ledger and plan.batch_size > MAX_STEP_EXAMPLES:
        raise UserError(
            f"a ledger cannot tell {plan.batch_size} examples a step, {MAX_STEP_EXAMPLES} at most: add --no-ledger"
        )
    ledger = known or Ledger(options.data.seed, plan.examples, plan.batch_size, at.step)
    ledger.roll_back(at.step)

    def begin_segment() -> None:
        if not options.checkpoints.ledger and (known is not None or not find_segments(folder / "ledger")):
            return
        if known is None and options.checkpoints.ledger and (gap := find_ledger_gap(folder / "ledger", at.step)):
            print(f"hvdtrain: warning: {gap}", file=sys.stderr, flush=True)
        # The first segment shows whether it can be written; a try that makes no step leaves no further one.
        again = options.checkpoints.ledger and bool(find_segments(folder / "ledger"))
        ledger.open_for_writing(folder / "ledger", at_first_row=again)
        if known is None and ledger.error is not None:
            raise UserError(write_error_text("the ledger", folder, ledger.error))
        if not options.checkpoints.ledger:  # the segment, which has no rows, takes back the steps that are undone
            ledger.close()

    collectives.on_root("ledger", begin_segment)
    return ledger


def collect_versions() -> dict[str, str]:
    """The versions that a run depends on."""
    found = {"hvdtrain": __version__, "python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
