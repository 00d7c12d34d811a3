"""`hvdtrain evaluate`: the training's own evaluation, of a checkpoint of a finished run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from hvdtrain.comm.world import World
from hvdtrain.elastic.membership import FixedMembership
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.base import check_split
from hvdtrain.recipe.framework import Step, find_framework
from hvdtrain.recipe.metrics import MetricValue
from hvdtrain.recipe.options import OptionValues
from hvdtrain.system import activity
from hvdtrain.system.errors import UserError
from hvdtrain.training.evaluation import evaluate_model
from hvdtrain.training.lease import Lease
from hvdtrain.training.metrics import RecipeMetrics
from hvdtrain.training.orders import EpochOrders
from hvdtrain.training.position import Position
from hvdtrain.training.reopening import ReopenedRun, reopen_run
from hvdtrain.training.reporter import Reporter
from hvdtrain.training.run import Generation, Run
from hvdtrain.training.setup import plan_generation
from hvdtrain.training.stop import StopRequest


@dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation; its fields are the keys of `hvdtrain evaluate --json`."""

    run: str  # the run folder
    recipe: str
    step: int  # of the checkpoint
    world_size: int
    examples: dict[str, int]  # of each split
    metrics: dict[str, dict[str, MetricValue]]  # of each split


def evaluate_run(run_dir: Path, which: str, split: str | None, given: OptionValues, world: World) -> EvaluationReport:
    """Evaluate a run's checkpoint on all ranks, by the code and in the batches of its training.

    Args:
        run_dir: the run folder.
        which: the checkpoint: "best", "last" or a step.
        split: what to evaluate; None: all evaluation sets of the recipe.
        given: run options that replace those of the run.
        world: of this rank.

    Raises:
        UserError: on all ranks, if there is no such run, checkpoint or split.
    """
    reopened = reopen_run(run_dir, which, given, world)
    recipe = reopened.opened.recipe
    if split is not None:
        check_split(recipe, split)
        vars(recipe)["evals"] = (split,)  # of this object alone
    if not recipe.evals:
        raise UserError(f"{type(recipe).__name__}.evals is empty: there is nothing to evaluate; expected --split train")
    activity.enter_activity("preparing the model and the datasets", patient=True)
    step = find_framework(type(recipe)).make_step(recipe, world, reopened.options)
    with contextlib.closing(step):
        empty = [name for name in recipe.evals if not step.examples[name]]
        if len(empty) == len(recipe.evals):
            names = " and ".join(f"dataset({name!r})" for name in empty)
            raise UserError(f"{type(recipe).__name__}.{names} has no examples: there is nothing to evaluate")
        position = replace(reopened.position, offset=0)  # the training examples do not matter
        generation = form_idle_generation(reopened, step, world, position)
        step.load_state(reopened.state)
        evaluate_model(generation, position)
    found = {recipe.evals[0]: position.eval, **position.evals}
    metrics = {name: found[name] for name in recipe.evals if found.get(name)}
    return EvaluationReport(
        run=str(reopened.opened.folder),
        recipe=reopened.opened.name,
        step=position.step,
        world_size=world.size,
        examples={name: step.examples[name] for name in metrics},
        metrics=metrics,
    )


def form_idle_generation(reopened: ReopenedRun, step: Step, world: World, position: Position) -> Generation:
    """Return a generation that evaluates and does not train: it owns no run folder and writes nothing."""
    opened, options, membership = reopened.opened, reopened.options, FixedMembership()
    metrics = RecipeMetrics(opened.recipe, step.layout)
    run = Run(
        name=opened.name,
        recipe=opened.recipe,
        source=None,
        options=options,
        membership=membership,
        step=step,
        metrics=metrics,
        lease=Lease(),
        report=Reporter(options.reports, metrics),
        stop=StopRequest(membership),
    )
    orders = EpochOrders(step, type(opened.recipe).__name__, options.data.seed, opened.folder, position, None)
    plan = plan_generation(run, world, position, orders)
    ledger = Ledger(options.data.seed, plan.examples, plan.batch_size, position.step)
    return Generation(
        run=run,
        world=world,
        plan=plan,
        orders=orders,
        folder=opened.folder,
        ledger=ledger,
        diagnosis=None,
        hosts=[world.host],
        formation_text="",
    )
