"""The training loop, top to bottom. It imports no framework: that stands behind `hvdtrain.step.Step`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain import messages
from hvdtrain.collectives import ops
from hvdtrain.collectives.world import World
from hvdtrain.data import order
from hvdtrain.elastic.ledger import Ledger, Row, hash_sum
from hvdtrain.errors import EXIT_REQUEUE, RunError, UserError, nearest
from hvdtrain.metrics import means
from hvdtrain.recipe import Recipe
from hvdtrain.step import TOLD, Agreed, Step
from hvdtrain.trainer import checkpoint
from hvdtrain.trainer.checkpoint import Position
from hvdtrain.trainer.options import RunOptions
from hvdtrain.trainer.plan import Plan, describe, make_plan
from hvdtrain.trainer.report import Reporter, describe_end
from hvdtrain.trainer.setup import new_ledger, run_folder, step_options, versions
from hvdtrain.trainer.signals import StopRequest

STEPS = {"torch": ("hvdtrain.torch.step", "TorchStep")}
# Places among what ranks tell each other: whether this one was asked to stop, how many ids it fed to the model, the sum
# of their hashes.
STOP, FED, HASHES = range(3)


@dataclass(frozen=True)
class Run:
    """What does not change during a run."""

    name: str  # of the recipe
    recipe: Recipe
    options: RunOptions
    world: World
    plan: Plan
    folder: Path


def train(recipe: Recipe, name: str, options: RunOptions, config: dict[str, Any], world: World) -> dict[str, Any]:
    """Train a recipe on this rank and return the summary; its "finished" is False where the run was asked to stop.

    name: what the recipe is called in the run folder. config: what config.json shall hold.
    Raises UserError for what a user can mend before the first step, RunError for a loss that is not finite.
    """
    module, cls = STEPS[recipe.framework]
    step: Step = getattr(importlib.import_module(module), cls)(recipe, world, step_options(options, world))
    check_best(recipe, step.metrics)
    folder = run_folder(options, name, config, world)
    at = resume(step, folder, name, world) if options.resume else Position()
    plan = make_plan(recipe, options, step.examples["train"], step.learning_rate(), world.size, at)
    run = Run(name, recipe, options, world, plan, folder)
    resumed_from = at.step or None
    report = Reporter(run.folder, plan.total_steps, options, active=world.rank == 0, from_step=at.step)
    with new_ledger(options, plan, at, folder, world) as ledger, StopRequest() as stop, report:
        report.lines([f"hvdtrain  {name} ({recipe.framework}), run folder {run.folder}", *describe(plan, options)])
        if options.resume:
            report.lines([f"resumed   at step {at.step}" if at.step else "resumed   at step 0: no checkpoint yet"])
        elif world.rank == 0:
            try:
                report.graph(step.graph())
            except Exception as error:  # of the recipe, traced: it trains all the same
                report.lines([f"graph     not drawn, tracing failed: {type(error).__name__}"])
        finished = run_steps(run, step, at, ledger, report, stop)
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
                "membership_changes": 0,
                "resumed_from": resumed_from,
                "skipped_nonfinite": at.skipped_nonfinite,
                "synthetic": bool(getattr(recipe, "synthetic", False)),
                "versions": versions(),
            }
        )
        report.lines(describe_end(summary, run.folder))
    messages.send("finished", rank=world.rank, code=0 if finished else EXIT_REQUEUE)
    # No rank leaves before rank 0 has written everything: launchers end all ranks when one has left.
    ops.barrier("end")
    return summary


def run_steps(run: Run, step: Step, at: Position, ledger: Ledger, report: Reporter, stop: StopRequest) -> bool:
    """Train from `at` to the end of the plan, moving `at` along. False if a rank was asked to stop on the way."""
    plan, options, world = run.plan, run.options, run.world
    evaluated = saved = at.step or None
    while at.step < plan.total_steps:
        # This rank's part of each step left in the epoch: how many examples in all, its bounds, its micro-batches.
        parts = []
        for ids in order.steps(plan.examples, plan.batch_size, options.seed, at.epoch, at.offset):
            first, end = order.bounds(len(ids), world.rank, world.size)
            parts.append((len(ids), first, end, order.chunks(ids[first:end], plan.micro_batch)))
        parts = parts[: plan.total_steps - at.step]
        batches = step.load("train", [chunk for *_, chunks in parts for chunk in chunks], at.epoch)

        for count, first, end, chunks in parts:
            begin = time.perf_counter()
            told = np.zeros(TOLD)
            told[STOP] = stop.requested
            step.begin(len(chunks), (end - first) / count, told)
            for chunk in chunks:
                # Every example weighs 1/count, wherever it is: the sum over ranks and passes is the global mean.
                # Randomness is drawn by the place in the global batch, so that it does not depend on the ranks either.
                ids, batch = next(batches)
                told[FED] += len(ids)
                told[HASHES] += hash_sum(ids)
                step.micro_batch(batch, len(chunk), 1 / count, (options.seed, at.step, first))
                first += len(chunk)
            agreed = step.exchange()
            stopping = agreed.told[STOP] > 0
            lr_factor = plan.schedule.factor(plan.position(at))
            if agreed.nonfinite:
                skip_or_end(run, agreed, at, report)
                step.skip()
                details: dict[str, float] = {}
            else:
                details = step.update(plan.lr_scale * lr_factor)
            seconds = time.perf_counter() - begin
            if news := step.news():
                report.lines(news)
                report.advice(step.exchange_report()["advisor"])

            epoch = at.epoch + 1
            ledger.append(Row(at.step + 1, epoch, at.offset, int(agreed.told[FED]), int(agreed.told[HASHES])))
            at.advance(count, None if agreed.nonfinite else float(agreed.sums[0]), plan.examples)
            last, epoch_ends = at.step == plan.total_steps, at.offset == 0
            values = means(step.metrics, agreed.sums, count) | details
            report.step(at, epoch, plan.lr * lr_factor, values, count, seconds, agreed.waited)
            if last or due(at.step, options.eval_every, epoch_ends):
                at.eval = evaluate(run, step)
                evaluated = at.step
                report.evaluation(at, epoch)
            if last or stopping or due(at.step, options.checkpoint_every, epoch_ends):
                save(run, step, at, ledger)
                saved = at.step
            report.flush()
            if stopping and not last:
                report.lines([f"stopped   at step {at.step}, saved; to go on: --resume --run-dir {run.folder}"])
                return False
    if evaluated != at.step or not at.eval:
        at.eval = evaluate(run, step)
    if saved != at.step:
        save(run, step, at, ledger)
    return True


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


def evaluate(run: Run, step: Step) -> dict[str, float]:
    """The metrics over the evaluation examples: each example once, on one rank; sums by counts."""
    count = step.examples["eval"]
    first, end = order.bounds(count, run.world.rank, run.world.size)
    sums = np.zeros(len(step.metrics))
    chunks = order.chunks(np.arange(first, end), run.plan.micro_batch)
    for chunk, (_, batch) in zip(chunks, step.load("eval", chunks, 0), strict=True):
        sums += step.evaluate(batch, len(chunk))
    return means(step.metrics, ops.sum_float64(sums, "evaluation"), count)


def save(run: Run, step: Step, at: Position, ledger: Ledger) -> None:
    """Rank 0 writes a checkpoint and removes old ones; the other ranks give it what only they have and go on."""
    state = step.state()
    ledger.durable()
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
