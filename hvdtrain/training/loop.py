"""The training loop, top to bottom. It imports no framework: that stands behind `hvdtrain.recipe.framework.Step`."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import time
from pathlib import Path
from typing import Any, Literal

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.diagnosis.diagnosis import Diagnosis
from hvdtrain.elastic.membership import EVICTED_TEXT, Membership, MembershipEnded
from hvdtrain.elastic.records import FOLDER, SOURCE
from hvdtrain.ledger.writer import Ledger, LedgerRow, sum_id_hashes
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.framework import FRAMEWORKS, Step, check_framework
from hvdtrain.recipe.metrics import compute_means
from hvdtrain.recipe.source import source_of_class
from hvdtrain.recipe.source_copy import describe_copy
from hvdtrain.system import activity, messages
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, RunError, UserError
from hvdtrain.training import hang
from hvdtrain.training.between import RunContext, evaluate_and_save, handle_nonfinite_step
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.folder import take_over_folder
from hvdtrain.training.lease import FolderLost, Lease
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import describe_training_plan, iterate_step_shares, make_training_plan
from hvdtrain.training.ragged import refuse_uneven_calls
from hvdtrain.training.regroup import enter_next_world
from hvdtrain.training.reporter import Reporter, describe_summary
from hvdtrain.training.setup import (
    collect_versions,
    copy_source,
    open_ledger,
    write_config,
)
from hvdtrain.training.start import agree_on_launch_name, begin_run, check_best_metric, compare_with_run
from hvdtrain.training.stop import FED, HASHES, HELD, KEPT, LEAVING, REGROUP, STOP, StopRequest

Ending = Literal["finished", "stopped", "regroup"]


def train_recipe(
    recipe: Recipe,
    name: str,
    options: RunOptions,
    config: dict[str, Any],
    world: World,
    membership: Membership | None = None,
) -> dict[str, Any]:
    """Train a recipe on this rank and return the summary; its "finished" is False where the run was asked to stop.

    name: what the recipe is called in the run folder. config: what config.json shall hold. membership: of an elastic
    run, whose worlds come and go; `world` is then this process alone.
    Raises UserError for what a user can fix before the first step, RunError for a loss that is not finite.
    """
    check_framework(type(recipe))
    hang.configure_hang_reporter(world.rank, world.size, options.faults.hang_limit)
    activity.enter_activity("preparing the model and the datasets", patient=True)
    module, cls = FRAMEWORKS[recipe.framework]
    step: Step = getattr(importlib.import_module(module), cls)(recipe, world, options)
    report, at, resumed_from = Reporter(options.reports), None, None
    ledger: Ledger | None = None
    source, notes = source_of_class(type(recipe)), list[str]()
    lease = Lease(agree_on_launch_name(membership))
    with StopRequest(membership) as stop, contextlib.closing(step), lease, report, contextlib.ExitStack() as files:
        if step.examples["eval"]:
            check_best_metric(recipe, step.metrics)
        if membership is not None:
            compare_with_run(membership, recipe, name, options, step.agreement_parts, world)
        diagnosis: Diagnosis | None = None
        while True:
            try:
                if membership is not None:
                    known: dict[str, Any] = {"rows": report.recent_rows, "ledger": ledger and ledger.to_state()}
                    known["diagnosis"] = diagnosis.build_history() if diagnosis is not None else []
                    files.close()
                    world, at, known = enter_next_world(membership, step, at, known)
                    hang.configure_hang_reporter(world.rank, world.size, options.faults.hang_limit)
                    reach, supervisor = membership.slot.host, os.getppid()
                    messages.send_message(
                        messages.RankStarted(world.rank, world.host, os.getpid(), world.size, reach, supervisor)
                    )
                begins = at is None
                if at is None:
                    folder, at = begin_run(step, options, name, world, membership, lease)
                    resumed_from = at.step or None
                    ledger = None
                elif membership is not None:
                    folder = take_over_folder(Path(membership.store.require(FOLDER)), lease)
                    report.recent_rows = known["rows"]
                    ledger = Ledger.from_state(known["ledger"])
                plan = make_training_plan(
                    recipe, options, step.examples["train"], step.base_learning_rate(), world.size, at
                )
                if step.score_uses_collectives:
                    refuse_uneven_calls(type(recipe).__name__, plan, step.examples["eval"], at)
                ledger = files.enter_context(open_ledger(ledger, options, plan, at, folder))
                if membership is not None and world.rank == 0:
                    membership.publish_start(at.step)
                if begins:
                    write_config(folder, config)
                    if source is not None:
                        notes = list(filter(None, [copy_source(folder, source)]))
                    if source is not None and membership is not None:
                        membership.store.put_if_absent(SOURCE, describe_copy(folder, source))
                if options.reports.diagnose:
                    earlier = known["diagnosis"] if membership is not None else []
                    diagnosis = Diagnosis(world, folder, options.reports.log_every, at.step, earlier)
                run = RunContext(name, recipe, options, world, plan, folder, lease, membership, ledger, diagnosis)
                report.open_files(run.folder, plan.total_steps, at, active=world.rank == 0)
                if membership is None or not membership.change_count:
                    report_run_start(run, step, at, report)
                    report.print_lines(notes)
                else:
                    ranks = f"{world.size} rank{'s' * (world.size > 1)}"
                    report.print_lines([f"world     {ranks}, from step {at.step} on; {membership.formation_text}"])
                ending = run_steps(run, step, at, report, stop)
            except MembershipEnded:
                # The next rank 0 needs it, if there is one.
                lease.keep_for_launch = membership is not None and not membership.has_run_ended()
                raise
            except FolderLost as lost:
                report.close_without_flush()
                if membership is not None and lost.same_launch:
                    raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED) from lost
                raise
            except (UserError, RunError):
                raise
            except Exception as error:
                if membership is None:
                    raise
                if not isinstance(error, collectives.PeersLost):  # it may not come again
                    membership.report_error(at.step if at is not None else 0, error)
                if step.update_in_progress:
                    at = None
                report.close()
                continue
            if ending == "regroup":
                continue
            break
        activity.enter_activity("ending the run", patient=True)
        finished = ending == "finished"
        summary = report.add_measurements(
            {
                "recipe": name,
                "framework": recipe.framework,
                "world_size": world.size,
                "steps": at.step,
                "epochs": plan.epochs,
                "finished": finished,
                "samples_seen": at.samples,
                "train_loss": at.train_loss,
                "eval": at.eval,
                "wire_bytes_per_step": step.wire_bytes(),
                "compression": options.compression.spec,
                "buckets": step.exchange_report()["buckets"],
                "membership_changes": membership.change_count if membership is not None else 0,
                "resumed_from": resumed_from,
                "skipped_nonfinite": at.skipped_nonfinite,
                "synthetic": bool(getattr(recipe, "synthetic", False)),
                "versions": collect_versions(),
            }
        )
        lease.check_ownership()
        failed = report.write_summary(summary)
        if not failed:
            report.print_lines(describe_summary(summary, run.folder))
    code = EXIT_FAILED if failed else 0 if finished else EXIT_REQUEUE
    # No rank leaves before rank 0 has written everything: launchers end all ranks when one has left.
    wait_for_all_ranks(world, membership, code, failed)
    messages.send_message(messages.RankFinished(world.rank, code))
    return summary


def report_run_start(run: RunContext, step: Step, at: Position, report: Reporter) -> None:
    """Tell people what will be done."""
    threads = run.options.resolve_threads(run.world.local_size)
    report.print_lines(
        [
            f"hvdtrain  {run.recipe_name} ({run.recipe.framework}), run folder {run.folder}",
            *describe_training_plan(run.plan, run.options),
            f"threads   {threads.count} per rank, from {threads.source}",
        ]
    )
    if run.options.checkpoints.resume:
        report.print_lines([f"resumed   at step {at.step}" if at.step else "resumed   at step 0: no checkpoint yet"])
    elif not at.step:
        try:
            report.write_graph(step.trace_graph())  # on all ranks, for `score` may exchange something with the others
        except UserError as error:
            report.print_lines([f"graph     not drawn: {error}"])
        except Exception as error:  # of the recipe, traced: it trains all the same
            report.print_lines([f"graph     not drawn, tracing failed: {type(error).__name__}"])


def run_steps(run: RunContext, step: Step, at: Position, report: Reporter, stop: StopRequest) -> Ending:
    """Train from `at` on, moving it along, until the plan is done, or all agreed to stop or to regroup."""
    plan, options, world, membership, diagnosis = run.plan, run.options, run.world, run.membership, run.diagnosis
    if at.step:
        evaluate_and_save(run, step, at, report)
    activity.begin_training(at.step)
    while at.step < plan.total_steps:
        left = itertools.islice(
            iterate_step_shares(plan, options.data.seed, at.epoch, at.offset, world.rank), plan.total_steps - at.step
        )
        ahead, parts = itertools.tee(left)  # the loader is some batches ahead
        chunks = (chunk for share in ahead for shard in share.shards for chunk in shard)
        batches = step.load_batches("train", chunks, at.epoch)
        batches = diagnosis.time_batches(batches) if diagnosis is not None else batches

        for share in parts:
            count, first, shards = share.step_examples, share.first_index, share.shards
            start = time.perf_counter()
            mine = list(itertools.chain.from_iterable(shards))
            told = stop.collect_votes()
            if world.rank == 0:
                told[KEPT], told[HELD] = run.ledger.durable_step, report.pending_rows
            step.start_step([len(chunks) for chunks in shards], sum(map(len, mine)) / count, told)
            for chunk in mine:
                # Every example weighs 1/count, wherever it is: the sum over ranks and passes is the global mean.
                # Randomness is drawn by the place in the global batch, so that it does not depend on the ranks either.
                activity.enter_activity("loading its batch")
                ids, batch = next(batches)
                activity.enter_activity("computing gradients")
                told[FED] += len(ids)
                told[HASHES] += sum_id_hashes(ids)
                step.accumulate_gradients(batch, len(chunk), 1 / count, (options.data.seed, at.step, first))
                first += len(chunk)
            activity.enter_activity("exchanging gradients")
            agreed = step.all_reduce()
            if diagnosis is not None:
                diagnosis.record_exchange(start, agreed.waited_seconds)
            activity.enter_activity("updating the model")
            lr_factor = plan.schedule.factor(plan.schedule_step(at))
            if agreed.must_skip:
                handle_nonfinite_step(run, agreed, at, report)
                step.skip_update()
                details: dict[str, float] = {}
            else:
                details = step.apply_update(plan.lr_scale * lr_factor, (options.data.seed, at.step, -1))
            seconds = time.perf_counter() - start
            if news := step.take_messages():
                report.print_lines(news)
                report.record_advice(step.exchange_report()["advisor"])

            epoch = at.epoch + 1
            run.lease.check_ownership()
            # Only now: that this step took place tells that rank 0 has outlived its writing.
            run.ledger.discard_rows(int(agreed.votes[KEPT]))
            report.pending_rows = int(agreed.votes[HELD])
            run.ledger.append_row(
                LedgerRow(at.step + 1, epoch, at.offset, int(agreed.votes[FED]), int(agreed.votes[HASHES]))
            )
            at.advance_past_step(count, None if agreed.must_skip else float(agreed.score_sums[0]))
            activity.record_finished_steps(at.step)
            last = at.step == plan.total_steps
            values = compute_means(step.metrics, agreed.score_sums, count) | details
            report.record_step(at, epoch, plan.lr * lr_factor, values, count, seconds, agreed.waited_seconds)
            leaving = int(agreed.votes[LEAVING])
            # The second: too few would be left to go on.
            stopping = bool(
                agreed.votes[STOP] > 0 or (leaving and membership and membership.is_below_minimum(world.size - leaving))
            )
            if diagnosis is not None and (last or stopping or diagnosis.is_comparison_due(at.step)):
                report.print_lines(diagnosis.compare_ranks(step, at.step, ends=last or stopping))
            evaluate_and_save(run, step, at, report, stopping=stopping, leaving=leaving > 0)
            report.report_write_errors(run.ledger)
            if last:
                break
            if stopping:
                report.print_lines([f"stopped   at step {at.step}, saved; to go on: --resume --run-dir {run.folder}"])
                return "stopped"
            if membership is not None and (leaving or agreed.votes[REGROUP]):
                membership.leave_if_requested()
                return "regroup"
    return "finished"


def wait_for_all_ranks(world: World, membership: Membership | None, code: int, error: str | None) -> None:
    """Wait for the other ranks, all of which are done. Raises RunError on all where one has an error."""
    if membership is not None and world.rank == 0:
        membership.publish_end(code, error or "")
    try:
        errors = collectives.gather_json(error, "end")
    except collectives.PeersLost:
        if membership is None or not membership.has_run_ended():
            raise
        verdict = membership.get_verdict()
        errors = [error or (verdict.error if verdict is not None else None)]
    if found := next(filter(None, errors), None):
        raise RunError(found)
