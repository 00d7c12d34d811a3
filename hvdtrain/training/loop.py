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
from hvdtrain.elastic.membership import LOST, Gone, Membership
from hvdtrain.ledger.writer import Ledger, Row, hash_sum
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.framework import FRAMEWORKS, Step, check_framework
from hvdtrain.recipe.metrics import means
from hvdtrain.recipe.source import source_of
from hvdtrain.recipe.source_copy import describe_copy
from hvdtrain.system import activity, messages
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, RunError, UserError
from hvdtrain.training import hang
from hvdtrain.training.between import Run, after_step, skip_or_end
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.folder import hand_on_folder
from hvdtrain.training.lease import FolderLost, Lease
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import describe, make_plan, shares
from hvdtrain.training.ragged import refuse_uneven_calls
from hvdtrain.training.regroup import join
from hvdtrain.training.reporter import Reporter, describe_end
from hvdtrain.training.setup import copy_source, open_ledger, resolve_threads, step_options, versions, write_config
from hvdtrain.training.start import begin, check_best, compare_with_run, launch_name
from hvdtrain.training.stop import FED, HASHES, HELD, KEPT, LEAVING, REGROUP, STOP, StopRequest

Ending = Literal["finished", "stopped", "regroup"]


def train(
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
    hang.know(world.rank, world.size, options.hang_limit)
    activity.enter("preparing the model and the datasets", patient=True)
    module, cls = FRAMEWORKS[recipe.framework]
    step: Step = getattr(importlib.import_module(module), cls)(recipe, world, step_options(options, world))
    report, at, resumed_from = Reporter(options), None, None
    ledger: Ledger | None = None
    source, notes = source_of(type(recipe)), list[str]()
    lease = Lease(launch_name(membership))
    with StopRequest(membership) as stop, contextlib.closing(step), lease, report, contextlib.ExitStack() as files:
        if step.examples["eval"]:
            check_best(recipe, step.metrics)
        if membership is not None:
            compare_with_run(membership, recipe, name, options, step.parts, world)
        diagnosis: Diagnosis | None = None
        while True:
            try:
                if membership is not None:
                    known: dict[str, Any] = {"rows": report.recent, "ledger": ledger and ledger.state()}
                    known["diagnosis"] = diagnosis.history() if diagnosis is not None else []
                    files.close()
                    world, at, known = join(membership, step, at, known)
                    hang.know(world.rank, world.size, options.hang_limit)
                    about = {"rank": world.rank, "size": world.size, "host": world.host, "pid": os.getpid()}
                    messages.send("started", **about, reach=membership.slot.host, supervisor=os.getppid())
                begins = at is None
                if at is None:
                    folder, at = begin(step, options, name, world, membership, lease)
                    resumed_from = at.step or None
                    ledger = None
                elif membership is not None:
                    folder = hand_on_folder(Path(membership.board.fact("folder")), lease)
                    report.recent = known["rows"]
                    ledger = Ledger.from_state(known["ledger"])
                plan = make_plan(recipe, options, step.examples["train"], step.learning_rate(), world.size, at)
                if step.collectives:
                    refuse_uneven_calls(type(recipe).__name__, plan, step.examples["eval"], at)
                ledger = files.enter_context(open_ledger(ledger, options, plan, at, folder))
                if membership is not None and world.rank == 0:
                    membership.note_start(at.step)
                if begins:
                    write_config(folder, config)
                    if source is not None:
                        notes = list(filter(None, [copy_source(folder, source)]))
                    if source is not None and membership is not None:
                        membership.board.propose("source", describe_copy(folder, source))
                if options.diagnose:
                    earlier = known["diagnosis"] if membership is not None else []
                    diagnosis = Diagnosis(world, folder, options.log_every, at.step, earlier)
                run = Run(name, recipe, options, world, plan, folder, lease, membership, ledger, diagnosis)
                report.open(run.folder, plan.total_steps, at, active=world.rank == 0)
                if membership is None or not membership.changes:
                    introduce(run, step, at, report)
                    report.lines(notes)
                else:
                    ranks = f"{world.size} rank{'s' * (world.size > 1)}"
                    report.lines([f"world     {ranks}, from step {at.step} on; {membership.took}"])
                ending = run_steps(run, step, at, report, stop)
            except Gone:
                # The next rank 0 needs it, if there is one.
                lease.keep = membership is not None and not membership.over()
                raise
            except FolderLost as lost:
                report.abandon()
                if membership is not None and lost.same_launch:
                    raise Gone(LOST, EXIT_FAILED) from lost
                raise
            except (UserError, RunError):
                raise
            except Exception as error:
                if membership is None:
                    raise
                if not isinstance(error, collectives.PeersLost):  # it may not come again
                    membership.report_error(at.step if at is not None else 0, error)
                if step.torn:
                    at = None
                report.close()
                continue
            if ending == "regroup":
                continue
            break
        activity.enter("ending the run", patient=True)
        finished = ending == "finished"
        summary = report.measured(
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
                "compression": options.compression,
                "buckets": step.exchange_report()["buckets"],
                "membership_changes": membership.changes if membership is not None else 0,
                "resumed_from": resumed_from,
                "skipped_nonfinite": at.skipped_nonfinite,
                "synthetic": bool(getattr(recipe, "synthetic", False)),
                "versions": versions(),
            }
        )
        lease.check()
        failed = report.write_summary(summary)
        if not failed:
            report.lines(describe_end(summary, run.folder))
    code = EXIT_FAILED if failed else 0 if finished else EXIT_REQUEUE
    # No rank leaves before rank 0 has written everything: launchers end all ranks when one has left.
    end(world, membership, code, failed)
    messages.send("finished", rank=world.rank, code=code)
    return summary


def introduce(run: Run, step: Step, at: Position, report: Reporter) -> None:
    """Tell people what will be done."""
    threads = resolve_threads(run.options, run.world.local_size)
    report.lines(
        [
            f"hvdtrain  {run.name} ({run.recipe.framework}), run folder {run.folder}",
            *describe(run.plan, run.options),
            f"threads   {threads.count} per rank, from {threads.source}",
        ]
    )
    if run.options.resume:
        report.lines([f"resumed   at step {at.step}" if at.step else "resumed   at step 0: no checkpoint yet"])
    elif not at.step:
        try:
            report.graph(step.graph())  # on all ranks, for `score` may exchange something with the others
        except UserError as error:
            report.lines([f"graph     not drawn: {error}"])
        except Exception as error:  # of the recipe, traced: it trains all the same
            report.lines([f"graph     not drawn, tracing failed: {type(error).__name__}"])


def run_steps(run: Run, step: Step, at: Position, report: Reporter, stop: StopRequest) -> Ending:
    """Train from `at` on, moving it along, until the plan is done, or all agreed to stop or to regroup."""
    plan, options, world, membership, diagnosis = run.plan, run.options, run.world, run.membership, run.diagnosis
    if at.step:
        after_step(run, step, at, report)
    activity.begin_steps(at.step)
    while at.step < plan.total_steps:
        left = itertools.islice(shares(plan, options.seed, at.epoch, at.offset, world.rank), plan.total_steps - at.step)
        ahead, parts = itertools.tee(left)  # the loader is some batches ahead
        chunks = (chunk for share in ahead for shard in share.shards for chunk in shard)
        batches = step.load("train", chunks, at.epoch)
        batches = diagnosis.timed(batches) if diagnosis is not None else batches

        for share in parts:
            count, first, shards = share.examples, share.first, share.shards
            start = time.perf_counter()
            mine = list(itertools.chain.from_iterable(shards))
            told = stop.tell()
            if world.rank == 0:
                told[KEPT], told[HELD] = run.ledger.saved, report.behind
            step.begin([len(chunks) for chunks in shards], sum(map(len, mine)) / count, told)
            for chunk in mine:
                # Every example weighs 1/count, wherever it is: the sum over ranks and passes is the global mean.
                # Randomness is drawn by the place in the global batch, so that it does not depend on the ranks either.
                activity.enter("loading its batch")
                ids, batch = next(batches)
                activity.enter("computing gradients")
                told[FED] += len(ids)
                told[HASHES] += hash_sum(ids)
                step.micro_batch(batch, len(chunk), 1 / count, (options.seed, at.step, first))
                first += len(chunk)
            activity.enter("exchanging gradients")
            agreed = step.exchange()
            if diagnosis is not None:
                diagnosis.exchanged(start, agreed.waited)
            activity.enter("updating the model")
            lr_factor = plan.schedule.factor(plan.position(at))
            if agreed.skipped:
                skip_or_end(run, agreed, at, report)
                step.skip()
                details: dict[str, float] = {}
            else:
                details = step.update(plan.lr_scale * lr_factor, (options.seed, at.step, -1))
            seconds = time.perf_counter() - start
            if news := step.news():
                report.lines(news)
                report.advice(step.exchange_report()["advisor"])

            epoch = at.epoch + 1
            run.lease.check()
            # Only now: that this step took place tells that rank 0 has outlived its writing.
            run.ledger.forget(int(agreed.told[KEPT]))
            report.behind = int(agreed.told[HELD])
            run.ledger.append(Row(at.step + 1, epoch, at.offset, int(agreed.told[FED]), int(agreed.told[HASHES])))
            at.advance(count, None if agreed.skipped else float(agreed.sums[0]))
            activity.step_done(at.step)
            last = at.step == plan.total_steps
            values = means(step.metrics, agreed.sums, count) | details
            report.step(at, epoch, plan.lr * lr_factor, values, count, seconds, agreed.waited)
            leaving = int(agreed.told[LEAVING])
            # The second: too few would be left to go on.
            stopping = bool(
                agreed.told[STOP] > 0 or (leaving and membership and membership.too_few(world.size - leaving))
            )
            if diagnosis is not None and (last or stopping or diagnosis.due(at.step)):
                report.lines(diagnosis.compare(step, at.step, ends=last or stopping))
            after_step(run, step, at, report, stopping=stopping, leaving=leaving > 0)
            report.look_for_room(run.ledger)
            if last:
                break
            if stopping:
                report.lines([f"stopped   at step {at.step}, saved; to go on: --resume --run-dir {run.folder}"])
                return "stopped"
            if membership is not None and (leaving or agreed.told[REGROUP]):
                membership.leave_if_asked()
                return "regroup"
    return "finished"


def end(world: World, membership: Membership | None, code: int, error: str | None) -> None:
    """Wait for the other ranks, all of which are done. Raises RunError on all where one has an error."""
    if membership is not None and world.rank == 0:
        membership.end(code, error or "")
    try:
        errors = collectives.gather_json(error, "end")
    except collectives.PeersLost:
        if membership is None or not membership.over():
            raise
        verdict = membership.verdict()
        errors = [error or (verdict["error"] if verdict is not None else None)]
    if found := next(filter(None, errors), None):
        raise RunError(found)
