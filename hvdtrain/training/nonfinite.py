"""Steps that all ranks skip together: losses or gradients are not finite, or there is nothing to learn from."""

from __future__ import annotations

from hvdtrain.comm import collectives
from hvdtrain.recipe.framework import RoundResult, StepResult
from hvdtrain.system.errors import RunError
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation


def count_skipped_step(generation: Generation, result: StepResult, position: Position) -> None:
    """Count and report a step that is skipped. Raises RunError on all ranks if too many were not finite."""
    if result.is_nonfinite:
        count_nonfinite_step(generation, result, position)
    elif position.skipped == position.skipped_nonfinite:  # the first one
        line = f"skipped   step {position.step + 1}: the denominators of the loss add up to 0 (also of later steps)"
        generation.run.report.print_lines([line])


def count_nonfinite_step(generation: Generation, result: StepResult, position: Position) -> None:
    """Count and report a step that is skipped. Raises RunError on all ranks if there were too many."""
    run, world = generation.run, generation.world
    if result.nonfinite_loss:
        here = f"rank {world.rank} on {world.host}" if result.nonfinite_loss_here else None
        ranks = ", ".join(rank for rank in collectives.gather_json(here, "nonfinite") if rank)
        cause, skipped = "the loss is not finite", f"the loss is not finite on {ranks}"
        place, advice = f", on {ranks}", "lower --lr, clip with --clip-norm"
    else:
        names = result.nonfinite_gradients
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        skipped = f"the gradient of {names[0]}{more} is not finite, though the loss is"
        cause, place, advice = f"{skipped},", "", "look in score for a root, norm or division at 0"
    position.skipped_nonfinite += 1
    if position.skipped_nonfinite > run.options.faults.skip_nonfinite:
        raise RunError(
            f"{cause} at step {position.step + 1} (epoch {position.epoch + 1}){place}; "
            f"{advice}, or skip such steps with --skip-nonfinite N"
        )
    run.report.print_lines([f"skipped   step {position.step + 1}: {skipped}"])


def count_left_out_updates(generation: Generation, result: RoundResult, position: Position) -> None:
    """Count and report updates that single ranks left out in a round. Raises RunError on all ranks if too many."""
    run, round_end = generation.run, f"in the round that ended at step {position.step}"
    position.skipped += len(result.nonfinite)
    position.row_skipped += len(result.nonfinite)
    position.skipped_nonfinite += len(result.nonfinite)
    if result.nonfinite and position.skipped_nonfinite > run.options.faults.skip_nonfinite:
        raise RunError(
            f"{result.nonfinite[0]}, though the loss is, {round_end}; look in score for a root, norm or division at 0, "
            "or leave out such updates with --skip-nonfinite N"
        )
    run.report.print_lines([f"left out  an update {round_end}: {text}" for text in result.nonfinite])
