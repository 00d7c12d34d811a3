"""The training loop: batch, gradients, exchange, update, ledger row, report, decision, evaluation, checkpoint.

Nothing here, nor in the rest of training/, knows a framework: the model is behind `hvdtrain.recipe.framework.Step`.
torch is imported all the same, by hvdtrain.comm, whose collectives carry the numbers of every framework as its tensors.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hvdtrain.ledger.rows import LedgerRow, sum_id_hashes
from hvdtrain.recipe.framework import Chunk, DataSource, StepResult, StepVotes
from hvdtrain.recipe.now import Now
from hvdtrain.recipe.order import Ids
from hvdtrain.system import activity
from hvdtrain.training.dealing import find_new_shares
from hvdtrain.training.evaluation import check_best_found, conclude_evaluation, evaluate_model
from hvdtrain.training.hooks import check_lr_factor, find_lr_factor
from hvdtrain.training.nonfinite import count_skipped_step
from hvdtrain.training.plan import StepShare, is_due, iterate_step_shares
from hvdtrain.training.position import Position
from hvdtrain.training.reporter import StepReport
from hvdtrain.training.round_ends import end_round_if_over
from hvdtrain.training.run import Generation, Run
from hvdtrain.training.saving import save_checkpoint
from hvdtrain.training.speed import StepTime
from hvdtrain.training.streams import count_own_examples, number_own_examples

Batches = Iterator[tuple[Ids, Any]]  # the ids that were loaded, and what the framework makes of them


class Ending(enum.Enum):
    """How the steps of a generation have ended."""

    FINISHED = "the plan is done"
    STOPPED = "all ranks were asked to stop, or too few would be left"
    MEMBERS_LEAVE = "some ranks leave; the others form a generation without them"
    MEMBERS_JOIN = "newcomers are ready; all form a generation with them"
    SHARES_CHANGE = "the batch is dealt by other shares to the same ranks"


@dataclass(frozen=True)
class StepOutcome:
    """What a step has come to, before it is committed."""

    result: StepResult
    update_report: dict[str, float]  # what the update reports: the gradient's norm, ...
    lr: float
    seconds: float


Steps = Iterator[tuple[StepShare, StepOutcome]]


def run_loop(
    generation: Generation, position: Position, make_steps: Callable[[Generation, Position], Steps] | None = None
) -> Ending:
    """Train from `position` on, and move it along, until the plan is done or all agree to end the generation.

    make_steps: makes the remaining steps of an epoch; None: `train_steps`.
    """
    make_steps = make_steps or train_steps
    if position.step:  # what was due when another rank was lost
        end_round_if_over(generation, position)
        evaluate_and_save(generation, position, None)
    activity.begin_training(position.step)
    while position.step < generation.plan.total_steps and not position.ended:
        for share, outcome in make_steps(generation, position):
            if (ending := conclude_step(generation, position, share, outcome)) is not None:
                return ending
    return Ending.FINISHED


def train_steps(generation: Generation, position: Position) -> Steps:
    """Make the remaining steps of the epoch; yield each before it is committed."""
    for share, batches in plan_epoch(generation, position):
        yield share, train_step(generation, position, share, batches)


def conclude_step(generation: Generation, position: Position, share: StepShare, outcome: StepOutcome) -> Ending | None:
    """Commit a step, and do what is due after it; return whether the generation ends, and how."""
    commit_step(generation, position, share, outcome)
    votes = outcome.result.votes
    end_round_if_over(generation, position, votes)
    ending = decide(generation, position, votes)
    if ending is None and votes.compares_speeds and find_new_shares(generation, position):
        ending = Ending.SHARES_CHANGE
    compare_replicas(generation, position, ending)
    evaluate_and_save(generation, position, ending)
    generation.run.report.report_write_errors(generation.ledger)
    return Ending.FINISHED if position.ended else ending


def plan_epoch(generation: Generation, position: Position) -> Iterator[tuple[StepShare, Batches]]:
    """Yield this rank's share of each remaining step of the epoch, and the batches to take its micro-batches from."""
    plan, run = generation.plan, generation.run
    now = generation.set_now(position, training=True)
    epoch_order = generation.orders.begin_epoch(position, generation.ledger)
    data_rank = generation.world.data_rank
    shares = iterate_step_shares(plan, epoch_order, position.offset, data_rank, position.owed)
    if run.step.source is DataSource.DIVIDED_STREAM:
        shares = number_own_examples(shares, count_own_examples(plan, position, data_rank))
    shares_ahead, shares = itertools.tee(itertools.islice(shares, plan.total_steps - position.step))
    # Loading is some batches ahead of the steps.
    place = position.offset if generation.orders.may_repeat else None
    chunks = iterate_chunks(shares_ahead, now, place)
    batches = run.step.load_batches("train", chunks, position.epoch)
    if generation.diagnosis is not None:
        batches = generation.diagnosis.time_batches(batches)
    for share in shares:
        yield share, batches


def iterate_chunks(shares: Iterable[StepShare], now: Now, place: int | None) -> Iterator[Chunk]:
    """Yield what a rank loads for its shares of some steps of an epoch.

    Args:
        shares: of these steps.
        now: of the first one.
        place: of its first example in the epoch's order; None: ids do without it.
    """
    for share in shares:
        index = share.first_index
        for ids in itertools.chain.from_iterable(share.shards):
            # Examples that are owed are not neighbours; their places only have to differ within the step.
            first = share.owed[0][0] if share.owed and place is not None else place
            yield Chunk(ids, now, index, None if first is None else first + index)
            index += len(ids)
        now = replace(now, step=now.step + 1, samples=now.samples + share.step_examples)
        place = place if place is None or share.owed else place + share.step_examples


def train_step(generation: Generation, position: Position, share: StepShare, batches: Batches) -> StepOutcome:
    """Compute gradients, exchange them with the other ranks, and update the model."""
    run, plan, start = generation.run, generation.plan, time.perf_counter()
    lr_factor, lr_hash = find_lr_factor(generation, position, generation.set_now(position, training=True))
    votes = replace(collect_votes(generation), lr_hashes=lr_hash)
    accumulate_micro_batches(generation, position, share, batches, votes)
    activity.enter_activity("exchanging gradients")
    result = run.step.all_reduce()
    computed = time.perf_counter() - start - result.waited_here
    if generation.diagnosis is not None:
        generation.diagnosis.record_exchange(start, result.waited_here)
    activity.enter_activity("updating the model")
    check_lr_factor(generation, position, lr_factor, result.votes.lr_hashes == lr_hash * generation.world.size)
    if result.must_skip:
        count_skipped_step(generation, result, position)
    update = partial(update_model, generation, position, result, lr_factor)
    is_held = (generation.world.is_grid or run.step.updates_together) and run.membership.world_may_change
    update_report = run.held.make_together(update) if is_held else update()
    seconds = time.perf_counter() - start
    if generation.speeds is not None:
        generation.speeds.record_step(share.own_examples, computed, seconds)
    return StepOutcome(result, update_report, plan.lr * lr_factor, seconds)


def update_model(generation: Generation, position: Position, result: StepResult, lr_factor: float) -> dict[str, float]:
    """Apply the step's gradients, or skip the update; return what to report. If it is held, without collectives."""
    run, plan = generation.run, generation.plan
    if result.must_skip:
        run.step.skip_update()
        report: dict[str, float] = {}
    else:
        report = run.step.apply_update(plan.lr_scale * lr_factor, (run.options.data.seed, position.step, -1))
    if plan.pruning is not None:
        report["sparsity"] = run.step.prune(plan.pruning.sparsity_after(plan.schedule_step(position) + 1))
    return report


def accumulate_micro_batches(
    generation: Generation, position: Position, share: StepShare, batches: Batches, votes: StepVotes
) -> None:
    """Add up the gradients of this rank's micro-batches; the last one carries the rank's votes.

    Every example weighs 1 / the examples of the step, wherever it is: the sum over ranks and passes is the global mean;
    in a local step 1 / this rank's examples.
    Randomness is drawn by the place in the global batch, so that it does not depend on the ranks either.
    """
    run = generation.run
    micro_batches = [chunk for shard in share.shards for chunk in shard]
    index, is_local = share.first_index, generation.plan.is_local(position)
    weight = 1 / max(1, share.own_examples) if is_local else 1 / share.step_examples
    passes = [len(shard) for shard in share.shards]
    most_passes = max(generation.plan.count_passes(share.step_examples)) if generation.plan.max_passes > 1 else 1
    batch_share = share.own_examples / share.step_examples
    run.step.start_step(passes, batch_share, is_local, most_passes - len(micro_batches))
    if not micro_batches:
        run.step.cast_votes(votes)
    for left, chunk in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
        activity.enter_activity("loading its batch")
        ids, batch = next(batches)
        activity.enter_activity("computing gradients")
        if generation.world.counts_examples:
            votes = replace(votes, examples=votes.examples + len(ids), id_hashes=votes.id_hashes + sum_id_hashes(ids))
        if left == 0:
            run.step.cast_votes(votes)
        seed = (run.options.data.seed, position.step, index)
        run.step.accumulate_gradients(batch, len(chunk), weight, seed)
        index += len(chunk)


def collect_votes(generation: Generation) -> StepVotes:
    """Return this rank's votes before it has fed an example to the model."""
    votes = generation.run.stop.collect_votes()
    if generation.world.rank != 0:
        return votes
    written, pending = generation.ledger.durable_step, generation.run.report.rows.pending
    compares = generation.speeds is not None and generation.speeds.is_due()
    return replace(votes, ledger_durable=written, pending_rows=pending, compares_speeds=int(compares))


def commit_step(generation: Generation, position: Position, share: StepShare, outcome: StepOutcome) -> None:
    """Write the step to the ledger, move `position` past it, and report it."""
    run, ledger, result, votes = generation.run, generation.ledger, outcome.result, outcome.result.votes
    if lines := run.step.take_messages():
        run.report.print_lines(lines)
        run.report.record_advice(run.step.exchange_report().advice)
    run.lease.check_ownership()
    # Only now: that this step took place shows that rank 0 has outlived its writing.
    ledger.discard_rows(votes.ledger_durable)
    run.report.rows.pending = votes.pending_rows
    epoch = position.epoch + 1
    if share.made is not None:
        ledger.record_made(position.step + 1, share.made)
    elif share.owed:
        ledger.record_owed(position.step + 1, share.owed)
    ledger.append_row(LedgerRow(position.step + 1, epoch, position.offset, votes.examples, votes.id_hashes))
    count = share.step_examples
    if generation.plan.is_local(position):
        run.round.record_step(position, share, is_skipped=result.must_skip)
    loss = count_scores(run, position, outcome, share)
    activity.record_finished_steps(position.step)
    step_time = StepTime(count, outcome.seconds, result.waited_here)
    run.report.record_step(position, StepReport(epoch, outcome.lr, loss, outcome.update_report, step_time))


def count_scores(run: Run, position: Position, outcome: StepOutcome, share: StepShare) -> float:
    """Move past a step, add its scores to the sums of the epoch and of the next row, and return its loss."""
    result, count = outcome.result, share.step_examples
    layout, sums = run.step.layout, result.score_sums
    numerator, denominator = layout.loss_sums(sums, count)
    position.advance_past_step(count, None if result.must_skip else (numerator, denominator), share.owed)
    if not run.round.steps:
        position.end_epoch()
    if not result.must_skip:
        position.add_to_row(sums.tolist(), count)
    is_skipped = result.must_skip or outcome.update_report.get("skipped", 0.0) > 0
    position.skipped += is_skipped
    position.row_skipped += is_skipped
    return numerator / denominator if denominator else 0.0


def decide(generation: Generation, position: Position, votes: StepVotes) -> Ending | None:
    """Return whether the generation ends after this step, and how; the same on all ranks, which have the same votes."""
    if position.step == generation.plan.total_steps:
        return Ending.FINISHED
    too_few = votes.leave > 0 and generation.run.membership.is_below_minimum(generation.world.size - votes.leave)
    if votes.stop or too_few:
        return Ending.STOPPED
    if votes.leave:
        return Ending.MEMBERS_LEAVE
    return Ending.MEMBERS_JOIN if votes.regroup else None


def compare_replicas(generation: Generation, position: Position, ending: Ending | None) -> None:
    """With --diagnose, compare the ranks' times and weights if that is due, before anything is saved."""
    diagnosis, ends = generation.diagnosis, ending in (Ending.FINISHED, Ending.STOPPED)
    if diagnosis is not None and (ends or diagnosis.is_comparison_due(position.step)):
        lines = diagnosis.compare_ranks(generation.run.step, position.step, ends=ends)
        generation.run.report.print_lines(lines)


def evaluate_and_save(generation: Generation, position: Position, ending: Ending | None) -> None:
    """Evaluate and save if that is due after this step and not done yet; then the step's row is complete."""
    run, options = generation.run, generation.run.options
    is_last, epoch_ends = position.step >= generation.plan.total_steps, position.offset == 0
    evaluates = is_last or is_due(position.step, options.reports.eval_every, epoch_ends)
    has_evaluation = any(run.step.examples[name] for name in run.recipe.evals)
    if evaluates and has_evaluation and position.evaluated != position.step:
        evaluate_model(generation, position)
        check_best_found(run.recipe, position)
        run.lease.check_ownership()
        run.report.record_evaluation(position, position.epoch + (not epoch_ends))
        conclude_evaluation(generation, position)
        if position.ended and ending not in (Ending.FINISHED, Ending.STOPPED):
            compare_replicas(generation, position, Ending.FINISHED)
    must = is_last or ending == Ending.STOPPED or bool(position.ended)
    saves = must or ending == Ending.MEMBERS_LEAVE or is_due(position.step, options.checkpoints.every, epoch_ends)
    if saves and position.saved != position.step:
        save_checkpoint(generation, position, must=must)
    activity.enter_activity("training")
    run.report.write_due_row()
