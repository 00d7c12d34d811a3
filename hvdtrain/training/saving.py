"""Checkpoints of a run: all ranks save one together, and all resume from rank 0's."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hvdtrain.comm import collectives
from hvdtrain.recipe.framework import Step
from hvdtrain.system import activity
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.files import write_error_text
from hvdtrain.training import checkpoint
from hvdtrain.training.checkpoint import BestCheckpoint, Checkpoint
from hvdtrain.training.folder import check_folder_ownership
from hvdtrain.training.lease import FolderLost
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation, Run


def save_checkpoint(generation: Generation, position: Position, *, must: bool) -> None:
    """Write a checkpoint on rank 0 and remove old ones; the other ranks give it what only they have and wait for it.

    Args:
        generation: the ranks that save.
        position: where the state belongs; its `saved` is set.
        must: the checkpoint is what the run leaves when it ends. Any other one may fail: rank 0 warns, and the next
            one is tried again.

    Raises:
        RunError: on all ranks, if the checkpoint cannot be written and `must` be.
        FolderLost: on rank 0, if the run folder is not this run's any more.
    """
    activity.enter_activity("saving a checkpoint", patient=True)
    error, is_fatal = None, True
    try:
        state = generation.run.step.gather_state()
        if generation.world.rank == 0:
            error = write_on_root(generation, position, state)
            is_fatal = must
    except FolderLost:
        raise
    except RunError as problem:
        error = str(problem)
    if error and not is_fatal:
        generation.run.report.print_warning(f"{error}; training continues, the next checkpoint is tried again")
    best = generation.run.report.best
    if generation.world.rank == 0 and not error:
        best = remove_old_checkpoints(generation) or best
    # Without this the others would wait for rank 0 in the next step.
    error, is_fatal, best = collectives.broadcast_json([error, is_fatal, asdict(best) if best else None], "save")
    generation.run.report.best = BestCheckpoint(**best) if best else None
    if error and is_fatal:
        raise RunError(error)
    position.saved = position.saved if error else position.step


def write_on_root(generation: Generation, position: Position, state: bytes) -> str | None:
    """Write all that a checkpoint needs to survive the machine; return what cannot be written, if so.

    Raises:
        FolderLost: the run folder is not this run's any more.
    """
    run, what = generation.run, "owner.json"
    try:
        check_folder_ownership(generation.folder, run.lease, run.report, generation.ledger)
        what = "metrics.jsonl"
        run.report.sync_rows()
        what = "the ledger"
        generation.ledger.make_durable()  # a checkpoint without the rows before it would lose them
        what = "its files"
        confirm = partial(run.lease.check_ownership, now=True)
        checkpoint.write_checkpoint(generation.folder, position, state, run.name, confirm=confirm)
    except OSError as problem:
        return write_error_text(f"step {position.step}'s checkpoint ({what})", generation.folder, problem)
    return None


def remove_old_checkpoints(generation: Generation) -> BestCheckpoint | None:
    """Remove the checkpoints that are not to be kept, and return the best one; warn if they cannot be removed."""
    run = generation.run
    try:
        return checkpoint.prune_checkpoints(generation.folder, run.options.checkpoints.keep, run.recipe.best)
    except OSError as problem:
        run.report.print_warning(f"old checkpoints cannot be removed: {problem.filename}: {problem.strerror}")
        return None


def resume_run(run: Run, folder: Path, *, unattended: bool = False) -> Position:
    """Load the newest checkpoint of rank 0's run folder on all ranks; return a new Position if there is none.

    Args:
        run: the run to resume.
        folder: the run folder.
        unattended: pass over checkpoints that are damaged, with a warning.

    Raises:
        UserError: on all ranks, if the checkpoint cannot be resumed from.
    """
    activity.enter_activity("reading a checkpoint", patient=True)
    found: Checkpoint | None = None

    def read_on_root() -> tuple[dict[str, object] | None, dict[str, object] | None]:
        nonlocal found
        found = checkpoint.read_newest_checkpoint(folder, run.name, unattended=unattended)
        warn_of_damage(found)
        best = checkpoint.find_best_checkpoint(folder, run.recipe.best)
        return vars(found.position) if found else None, asdict(best) if best else None

    saved, best = collectives.on_root("resume.position", read_on_root)
    run.report.best = BestCheckpoint(**best) if best else None  # type: ignore[arg-type]
    position = Position(**saved) if saved is not None else Position()  # type: ignore[arg-type]
    start_order(run, position)
    if saved is not None:
        run.step.load_state(collectives.broadcast_bytes(found.state if found else None, "resume.state"))
        position.saved = position.step
    return position


def start_order(run: Run, position: Position) -> None:
    """Let `position` belong to this run's order of its examples. Raises UserError on all ranks if it cannot."""
    step = run.step
    # Of an epoch in a sampler's order the length is that of the order: see hvdtrain.training.orders.
    examples = position.examples if position.order else step.examples["train"]
    position.set_example_order(examples, run.options.data.seed)
    position.set_score_layout(step.layout.describe())
    if position.offset and position.first_examples:
        collectives.on_all_ranks("resume.examples", lambda: refuse_changed_examples(step, position))
    position.first_examples = dict(step.first_examples)


def warn_of_damage(found: Checkpoint | None) -> None:
    """Print which checkpoints are damaged and which one is resumed from."""
    if found is None or not found.damage_reports:
        return
    resumed = f"resuming from {found.folder.name}, the newest checkpoint that is not damaged"
    for text in [*found.damage_reports, resumed]:
        print(f"hvdtrain: warning: {text}", file=sys.stderr, flush=True)


def refuse_changed_examples(step: Step, position: Position) -> None:
    """Raise UserError if ids mean other examples now than in the epoch that a checkpoint is in the middle of."""
    if changed := step.find_changed_example(position.first_examples):
        raise UserError(
            f"cannot resume at example {position.offset} of an epoch: {changed} is another example now; resume with "
            "the same data in the same order, or from a checkpoint at the end of an epoch"
        )
