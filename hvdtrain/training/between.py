"""What is done between steps: evaluation, checkpoints, and what comes of a loss that is not finite."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.diagnosis.diagnosis import Diagnosis
from hvdtrain.elastic.membership import Membership
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe import order
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.framework import Step, StepResult
from hvdtrain.recipe.metrics import compute_means
from hvdtrain.recipe.order import Ids
from hvdtrain.system import activity
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.files import write_error_text
from hvdtrain.training import checkpoint
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.folder import check_folder_ownership
from hvdtrain.training.lease import FolderLost, Lease
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.reporter import Reporter


@dataclass(frozen=True)
class RunContext:
    """What does not change during a run."""

    recipe_name: str  # of the recipe
    recipe: Recipe
    options: RunOptions
    world: World
    plan: TrainingPlan
    folder: Path
    lease: Lease
    membership: Membership | None
    ledger: Ledger
    diagnosis: Diagnosis | None


def is_step_due(step: int, every: int | None, epoch_ends: bool) -> bool:
    """Whether something done every N steps, or else once an epoch, is due."""
    return step % every == 0 if every else epoch_ends


def evaluation_chunks(count: int, plan: TrainingPlan, rank: int) -> Iterator[Ids]:
    """The ids of each pass of a rank over `count` evaluation examples; all ranks' passes together are all of them once.

    A deterministic run makes the same passes on any number of ranks; otherwise each rank has as many.
    """
    passes = -(-count // plan.eval_micro_batch)
    if not plan.deterministic:
        passes = -(-passes // plan.ranks) * plan.ranks
    for number in range(*order.part_bounds(passes, rank, plan.ranks)):
        first, end = order.part_bounds(count, number, passes)
        if first < end:
            yield np.arange(first, end)


def evaluate_model(run: RunContext, step: Step, at: Position) -> None:
    """Set `at.eval`, the metrics over the evaluation examples: each example once, on one rank; sums by counts."""
    activity.enter_activity("loading a batch of the evaluation")
    count = step.examples["eval"]
    sums = np.zeros(len(step.metrics))
    for ids, batch in step.load_batches("eval", evaluation_chunks(count, run.plan, run.world.rank), 0):
        activity.enter_activity("evaluating")
        sums += step.evaluate_batch(batch, len(ids), (run.options.data.seed, -1, int(ids[0])))
        activity.enter_activity("loading a batch of the evaluation")
    activity.enter_activity("evaluating")
    at.eval = compute_means(step.metrics, collectives.sum_float64(sums, "evaluation"), count)
    at.evaluated = at.step


def save_checkpoint(run: RunContext, step: Step, at: Position, report: Reporter, *, must: bool) -> None:
    """Rank 0 writes a checkpoint and removes old ones; the other ranks give it what only they have and wait for it.

    If it cannot be written, whatever the error, it warns, and the next one is tried again; but it raises RunError,
    on all ranks, for one that `must` be: it is what the run leaves when it ends. Raises FolderLost on rank 0 if the
    folder is not this run's any more.
    """
    error, final, what = None, True, "owner.json"
    try:
        state = step.gather_state()
        if run.world.rank == 0:
            check_folder_ownership(run.folder, run.lease, report, run.ledger)
            what = "metrics.jsonl"
            report.sync_rows()
            what = "the ledger"
            run.ledger.make_durable()  # a checkpoint without the rows before it would lose them
            what = "its files"
            checkpoint.write_checkpoint(
                run.folder, at, state, run.recipe_name, confirm=lambda: run.lease.check_ownership(now=True)
            )
    except FolderLost:
        raise
    except RunError as problem:
        error = str(problem)
    except OSError as problem:
        error, final = write_error_text(f"step {at.step}'s checkpoint ({what})", run.folder, problem), must
        if not final:
            report.print_warning(f"{error}; training goes on, the next one is tried again")
    if run.world.rank == 0 and not error:
        try:
            checkpoint.prune_checkpoints(run.folder, run.options.checkpoints.keep, run.recipe.best)
        except OSError as problem:
            report.print_warning(f"old checkpoints cannot be removed: {problem.filename}: {problem.strerror}")
    # The next step would wait for rank 0 as well.
    error, final = collectives.broadcast_json([error, final], "save")
    if error and final:
        raise RunError(error)
    at.saved = at.saved if error else at.step


def evaluate_and_save(
    run: RunContext, step: Step, at: Position, report: Reporter, *, stopping: bool = False, leaving: bool = False
) -> None:
    """Evaluate and save, where that is due after the step and not done: a rank may have been lost while it was."""
    last, epoch_ends = at.step >= run.plan.total_steps, at.offset == 0
    evaluates = step.examples["eval"] > 0
    if (
        evaluates
        and at.evaluated != at.step
        and (last or is_step_due(at.step, run.options.reports.eval_every, epoch_ends))
    ):
        evaluate_model(run, step, at)
        run.lease.check_ownership()
        report.record_evaluation(at, at.epoch + (not epoch_ends))
    if at.saved != at.step and (
        last or stopping or leaving or is_step_due(at.step, run.options.checkpoints.every, epoch_ends)
    ):
        activity.enter_activity("saving a checkpoint", patient=True)
        save_checkpoint(run, step, at, report, must=last or stopping)
    activity.enter_activity("training")
    report.write_due_row()


def resume_run(step: Step, folder: Path, name: str, world: World, seed: int, *, unattended: bool = False) -> Position:
    """Take over the newest checkpoint of rank 0's run folder on all ranks; a new Position if there is none.

    unattended: pass over checkpoints that are damaged, and say so.
    Raises UserError for one that cannot be gone on from.
    """
    activity.enter_activity("reading a checkpoint", patient=True)
    found, error = None, None
    if world.rank == 0:
        try:
            found = checkpoint.read_newest_checkpoint(folder, name, unattended=unattended)
            for text in found.damage_reports if found else []:
                print(f"hvdtrain: warning: {text}", file=sys.stderr, flush=True)
            if found and found.damage_reports:
                text = f"resuming from {found.folder.name}, the newest checkpoint that is whole"
                print(f"hvdtrain: warning: {text}", file=sys.stderr, flush=True)
        except UserError as problem:
            error = str(problem)
    error, position = collectives.broadcast_json([error, vars(found.position) if found else None], "resume.position")
    if error:
        raise UserError(error)
    at = Position(**(position or {}))
    at.set_example_order(step.examples["train"], seed)
    if at.offset and at.first_examples:
        collectives.on_all_ranks("resume.examples", lambda: refuse_changed_examples(step, at))
    at.first_examples = dict(step.first_examples)
    if position is not None:
        step.load_state(collectives.broadcast_bytes(found.state if found else None, "resume.state"))
        at.saved = at.step
    return at


def refuse_changed_examples(step: Step, at: Position) -> None:
    """Raise UserError if ids mean other examples now than in the epoch that a checkpoint is in the middle of."""
    if changed := step.find_changed_example(at.first_examples):
        raise UserError(
            f"the checkpoint is at example {at.offset} of an epoch in which {changed} was another example than it is "
            "now: resume with the same data in the same order, or from a checkpoint at the end of an epoch"
        )


def handle_nonfinite_step(run: RunContext, agreed: StepResult, at: Position, report: Reporter) -> None:
    """A loss or a gradient is not finite: all ranks skip the step together, or end together, naming the step."""
    if agreed.nonfinite_loss:
        mine = f"rank {run.world.rank} on {run.world.host}" if agreed.nonfinite_loss_here else None
        where = ", ".join(name for name in collectives.gather_json(mine, "nonfinite") if name)
        what, at_step, advice = "the loss is not finite", f", on {where}", "lower --lr, clip with --clip-norm"
        skipped = f"{what} on {where}"
    else:
        names = agreed.nonfinite_gradients
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        skipped = what = f"the gradient of {names[0]}{more} is not finite, though the loss is,"
        at_step, advice = "", "look in score for a root, norm or division at 0"
        skipped = skipped.removesuffix(",")
    at.skipped_nonfinite += 1
    if at.skipped_nonfinite > run.options.faults.skip_nonfinite:
        raise RunError(
            f"{what} at step {at.step + 1} (epoch {at.epoch + 1}){at_step}; "
            f"{advice}, or skip such steps with --skip-nonfinite N"
        )
    report.print_lines([f"skipped   step {at.step + 1}: {skipped}"])
