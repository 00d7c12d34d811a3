"""The training loop, top to bottom. It imports no framework: that stands behind `hvdtrain.step.Step`."""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hvdtrain import messages
from hvdtrain.collectives import ops
from hvdtrain.collectives.world import World
from hvdtrain.data import order
from hvdtrain.elastic.membership import Gone, Membership
from hvdtrain.errors import EXIT_REQUEUE, RunError, UserError, nearest
from hvdtrain.metrics import means
from hvdtrain.recipe import Recipe
from hvdtrain.step import Agreed, Step
from hvdtrain.trainer import checkpoint
from hvdtrain.trainer.checkpoint import Position
from hvdtrain.trainer.options import RunOptions
from hvdtrain.trainer.plan import Plan, describe, make_plan
from hvdtrain.trainer.regroup import join
from hvdtrain.trainer.report import Reporter, describe_end
from hvdtrain.trainer.setup import run_folder, step_options, versions
from hvdtrain.trainer.signals import LEAVING, REGROUP, STOP, StopRequest

STEPS = {"torch": ("hvdtrain.torch.step", "TorchStep")}
Ending = Literal["finished", "stopped", "regroup"]


@dataclass(frozen=True)
class Run:
    """What does not change during a run."""

    name: str  # of the recipe
    recipe: Recipe
    options: RunOptions
    world: World
    plan: Plan
    folder: Path
    membership: Membership | None


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
    Raises UserError for what a user can mend before the first step, RunError for a loss that is not finite.
    """
    module, cls = STEPS[recipe.framework]
    step: Step = getattr(importlib.import_module(module), cls)(recipe, world, step_options(options, world))
    check_best(recipe, step.metrics)
    report, at, resumed_from = Reporter(options), None, None
    with StopRequest(membership) as stop, report:
        while True:
            try:
                if membership is not None:
                    world, at, report.recent = join(membership, step, at, report.recent)
                    messages.send("started", rank=world.rank, host=world.host, pid=os.getpid())
                if at is None:
                    folder, at = begin(step, options, name, config, world, membership)
                    resumed_from = at.step or None
                elif membership is not None:
                    folder = Path(membership.board.fact("folder"))
                plan = make_plan(recipe, options, step.examples["train"], step.learning_rate(), world.size, at)
                run = Run(name, recipe, options, world, plan, folder, membership)
                report.open(run.folder, plan.total_steps, active=world.rank == 0, from_step=at.step)
                if membership is None or not membership.changes:
                    introduce(run, step, at, report)
                else:
                    report.lines([f"world     {world.size} rank{'s' * (world.size > 1)}, from step {at.step} on"])
                ending = run_steps(run, step, at, report, stop)
            except (UserError, RunError, Gone):
                raise
            except Exception as error:
                if membership is None:
                    raise
                if not isinstance(error, ops.PeersLost):  # it may not come again
                    membership.report_error(at.step if at is not None else 0, f"{type(error).__name__}: {error}")
                if step.torn:
                    at = None
                report.close()
                continue
            if ending == "regroup":
                continue
            break
        finished = ending == "finished"
        summary = report.summary(
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
        report.lines(describe_end(summary, run.folder))
    code = 0 if finished else EXIT_REQUEUE
    messages.send("finished", rank=world.rank, code=code)
    # No rank leaves before rank 0 has written everything: launchers end all ranks when one has left.
    end(world, membership, code)
    return summary


def begin(
    step: Step, options: RunOptions, name: str, config: dict[str, Any], world: World, membership: Membership | None
) -> tuple[Path, Position]:
    """The run folder, and where to begin: at step 0, or with the newest checkpoint where there is reason to."""
    if membership is not None and (known := membership.board.fact("folder")):  # all that had a state are gone
        return Path(known), resume(step, Path(known), name, world)
    if membership is not None and membership.generation > 1 and options.run_dir is not None:
        options = replace(options, resume=True)  # the first generation came so far as to make it
    folder = run_folder(options, name, config, world)
    at = resume(step, folder, name, world) if options.resume else Position()
    if membership is not None:
        membership.board.propose("folder", str(folder.absolute()))
    return folder, at


def introduce(run: Run, step: Step, at: Position, report: Reporter) -> None:
    """Tell people what will be done."""
    report.lines(
        [f"hvdtrain  {run.name} ({run.recipe.framework}), run folder {run.folder}", *describe(run.plan, run.options)]
    )
    if run.options.resume:
        report.lines([f"resumed   at step {at.step}" if at.step else "resumed   at step 0: no checkpoint yet"])
    elif run.world.rank == 0 and not at.step:
        try:
            report.graph(step.graph())
        except Exception as error:  # of the recipe, traced: it trains all the same
            report.lines([f"graph     not drawn, tracing failed: {type(error).__name__}"])


def run_steps(run: Run, step: Step, at: Position, report: Reporter, stop: StopRequest) -> Ending:
    """Train from `at` on, moving it along, until the plan is done, or all agreed to stop or to regroup."""
    plan, options, world, membership = run.plan, run.options, run.world, run.membership
    saved = at.step or None
    if at.step and at.evaluated != at.step and due(at.step, options.eval_every, at.offset == 0):
        evaluate(run, step, at)
    own = range(*order.bounds(plan.shards, world.rank, world.size))
    while at.step < plan.total_steps:
        # Of each step left in the epoch: how many examples in all, the place of this rank's first, and of each of this
        # rank's shards the micro-batches.
        parts = []
        for ids in order.steps(plan.examples, plan.batch_size, options.seed, at.epoch, at.offset):
            bounds = [order.bounds(len(ids), shard, plan.shards) for shard in own]
            shards = [order.chunks(ids[first:end], plan.micro_batch) for first, end in bounds]
            parts.append((len(ids), bounds[0][0] if bounds else 0, shards))
        parts = parts[: plan.total_steps - at.step]
        batches = step.load("train", [chunk for *_, shards in parts for chunks in shards for chunk in chunks], at.epoch)

        for count, first, shards in parts:
            start = time.perf_counter()
            mine = list(itertools.chain.from_iterable(shards))
            step.begin([len(chunks) for chunks in shards], sum(map(len, mine)) / count, stop.tell())
            for chunk in mine:
                # Every example weighs 1/count, wherever it is: the sum over ranks and passes is the global mean.
                # Randomness is drawn by the place in the global batch, so that it does not depend on the ranks either.
                step.micro_batch(next(batches), len(chunk), 1 / count, (options.seed, at.step, first))
                first += len(chunk)
            agreed = step.exchange()
            lr_factor = plan.schedule.factor(plan.position(at))
            if agreed.nonfinite:
                skip_or_end(run, agreed, at, report)
                step.skip()
                details: dict[str, float] = {}
            else:
                details = step.update(plan.lr_scale * lr_factor)
            seconds = time.perf_counter() - start
            if news := step.news():
                report.lines(news)
                report.advice(step.exchange_report()["advisor"])

            epoch = at.epoch + 1
            at.advance(count, None if agreed.nonfinite else float(agreed.sums[0]), plan.examples)
            last, epoch_ends = at.step == plan.total_steps, at.offset == 0
            values = means(step.metrics, agreed.sums, count) | details
            report.step(at, epoch, plan.lr * lr_factor, values, count, seconds, agreed.waited)
            leaving = int(agreed.told[LEAVING])
            # The second: too few would be left to go on.
            stopping = agreed.told[STOP] > 0 or bool(
                leaving and membership and membership.too_few(world.size - leaving)
            )
            if last or due(at.step, options.eval_every, epoch_ends):
                evaluate(run, step, at)
                report.evaluation(at, epoch)
            if last or stopping or leaving or due(at.step, options.checkpoint_every, epoch_ends):
                save(run, step, at)
                saved = at.step
            report.flush()
            if last:
                break
            if stopping:
                report.lines([f"stopped   at step {at.step}, saved; to go on: --resume --run-dir {run.folder}"])
                return "stopped"
            if membership is not None and (leaving or agreed.told[REGROUP]):
                membership.leave_if_asked()
                return "regroup"
    if at.evaluated != at.step or not at.eval:
        evaluate(run, step, at)
    if saved != at.step:
        save(run, step, at)
    return "finished"


def end(world: World, membership: Membership | None, code: int) -> None:
    """Wait for the other ranks, all of which are done."""
    if membership is not None and world.rank == 0:
        membership.end(code)
    try:
        ops.barrier("end")
    except ops.PeersLost:
        if membership is None or not membership.over():
            raise


def check_best(recipe: Recipe, metrics: Sequence[str]) -> None:
    """Raise UserError if the recipe's `best` names no metric of its own or no direction."""
    metric, direction = recipe.best
    if metric not in metrics:
        raise UserError(f"{type(recipe).__name__}.best: there is no metric {metric!r}{nearest(metric, metrics)}")
    if direction not in ("min", "max"):
        raise UserError(f"{type(recipe).__name__}.best: {direction!r} is no direction; expected 'min' or 'max'")


def due(step: int, every: int | None, epoch_ends: bool) -> bool:
    """Whether something done every N steps, or else once an epoch, is due."""
    return step % every == 0 if every else epoch_ends


def evaluate(run: Run, step: Step, at: Position) -> None:
    """Set `at.eval`, the metrics over the evaluation examples: each example once, on one rank; sums by counts."""
    count = step.examples["eval"]
    first, end = order.bounds(count, run.world.rank, run.world.size)
    sums = np.zeros(len(step.metrics))
    chunks = order.chunks(np.arange(first, end), run.plan.evaluated)
    for chunk, batch in zip(chunks, step.load("eval", chunks, 0), strict=True):
        sums += step.evaluate(batch, len(chunk))
    at.eval = means(step.metrics, ops.sum_float64(sums, "evaluation"), count)
    at.evaluated = at.step


def save(run: Run, step: Step, at: Position) -> None:
    """Rank 0 writes a checkpoint and removes old ones; the other ranks give it what only they have and go on."""
    state = step.state()
    if run.world.rank == 0:
        try:
            checkpoint.save(run.folder, at, state, run.name)
            checkpoint.prune(run.folder, run.options.keep, run.recipe.best)
        except OSError as error:
            raise RunError(f"cannot write step {at.step}'s checkpoint in {run.folder}: {error.strerror}") from error


def resume(step: Step, folder: Path, name: str, world: World) -> Position:
    """Take over the newest checkpoint of rank 0's run folder on all ranks; a new Position if there is none."""
    found, error = None, None
    if world.rank == 0:
        try:
            found = checkpoint.load_newest(folder, name)
        except UserError as problem:
            error = str(problem)
    error, position = ops.broadcast_json([error, vars(found[0]) if found else None], "resume.position")
    if error:
        raise UserError(error)
    if position is None:
        return Position()
    step.load_state(ops.broadcast_bytes(found[1] if found else None, "resume.state"))
    return Position(**position)


def skip_or_end(run: Run, agreed: Agreed, at: Position, report: Reporter) -> None:
    """A loss was not finite: all ranks skip the step together, or end together, naming the step and the rank."""
    mine = f"rank {run.world.rank} on {run.world.host}" if agreed.nonfinite_here else None
    where = ", ".join(name for name in ops.gather_json(mine, "nonfinite") if name)
    at.skipped_nonfinite += 1
    if at.skipped_nonfinite > run.options.skip_nonfinite:
        raise RunError(
            f"the loss is not finite at step {at.step + 1} (epoch {at.epoch + 1}), on {where}; "
            "lower --lr, clip with --clip-norm, or skip such steps with --skip-nonfinite N"
        )
    report.lines([f"skipped   step {at.step + 1}: the loss is not finite on {where}"])
