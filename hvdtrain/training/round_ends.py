"""When a round of local steps ends, and what is done then.

    a step is committed on all ranks   its ledger row is written, `position` is past it
    is_round_over                      all ranks know the same, and so decide the same
    end_round                          exchange what the ranks have changed: all have the same weights
    the epoch ends, evaluation, checkpoint

If a rank is lost in that exchange, the step is committed all the same: the next generation ends the round first, with
the changes of those that are left, unless something is owed to the epoch that was to end.
"""

from __future__ import annotations

import time

from hvdtrain.recipe.votes import StepVotes
from hvdtrain.system import activity
from hvdtrain.training.nonfinite import count_left_out_updates
from hvdtrain.training.plan import is_due
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation

NO_VOTES = StepVotes()


def end_round_if_over(generation: Generation, position: Position, votes: StepVotes = NO_VOTES) -> None:
    """Make all ranks' weights the same again if that is due after the last step; then end the epoch if it is over.

    votes: of that step; those of a step of an earlier generation are not needed: who has voted votes again.
    """
    run = generation.run
    if run.round.steps and is_round_over(generation, position, votes):
        began = time.perf_counter()
        activity.enter_activity("exchanging what local steps have changed")
        result = run.step.end_round()
        run.round.end_round()
        count_left_out_updates(generation, result, position)
        run.report.speed.add_to_next_step(time.perf_counter() - began, result.waited_here)
    if not run.round.steps:
        position.end_epoch()


def is_round_over(generation: Generation, position: Position, votes: StepVotes) -> bool:
    """Return whether the open round ends with the step before `position`; the same on all ranks.

    It ends after --local-steps steps, and before all that needs the same weights on all ranks.
    """
    run, plan, diagnosis = generation.run, generation.plan, generation.diagnosis
    step, epoch_ends = position.step, position.is_epoch_over
    due = [is_due(step, every, epoch_ends) for every in (run.options.reports.eval_every, run.options.checkpoints.every)]
    return (
        (plan.rounds is None or run.round.steps >= plan.rounds.steps)
        or (epoch_ends or step == plan.total_steps or any(due))
        or (votes.stop + votes.leave + votes.regroup > 0)
        or (diagnosis is not None and diagnosis.is_comparison_due(step))
    )
