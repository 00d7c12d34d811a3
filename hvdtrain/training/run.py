"""What a run consists of on this rank: what stays from its start to its end, and what stays for one generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.comm.world import World
from hvdtrain.diagnosis.diagnosis import Diagnosis
from hvdtrain.elastic.membership import Membership
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.framework import Step
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.source import RecipeSource
from hvdtrain.training.balance import SpeedComparison
from hvdtrain.training.held_update import HeldUpdate
from hvdtrain.training.lease import Lease
from hvdtrain.training.metrics import RecipeMetrics
from hvdtrain.training.open_round import OpenRound
from hvdtrain.training.options import RunOptions
from hvdtrain.training.orders import EpochOrders
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.position import Position
from hvdtrain.training.reporter import Reporter
from hvdtrain.training.service import Service
from hvdtrain.training.stop import StopRequest


@dataclass(frozen=True)
class Run:
    """What is the same object from the start of the run on this rank to its end."""

    name: str  # of the recipe, in the run folder
    recipe: Recipe
    source: RecipeSource | None  # of the recipe, as it was when the run started; None: no file is known
    options: RunOptions
    membership: Membership
    step: Step
    metrics: RecipeMetrics
    lease: Lease
    report: Reporter
    stop: StopRequest
    held: HeldUpdate = field(default_factory=HeldUpdate)  # of a grid in an elastic run
    round: OpenRound = field(default_factory=OpenRound)  # of --local-steps
    service: Service | None = None  # of --server


@dataclass(frozen=True)
class Generation:
    """What is the same object while the same ranks train together, with the same shares of the batch.

    A run of fixed membership has one generation.
    """

    run: Run
    world: World
    plan: TrainingPlan
    orders: EpochOrders
    folder: Path
    ledger: Ledger
    diagnosis: Diagnosis | None  # of --diagnose
    hosts: Sequence[str]  # of the ranks, each once
    formation_text: str  # how long it took to form, human-readable; "" for the first one
    speeds: SpeedComparison | None = None  # of --shares measured

    def set_now(self, position: Position, *, training: bool) -> Now:
        """Let the recipe know that the training is at `position`; return what it knows."""
        now = Now(
            folder=self.run.recipe.now.folder,
            rank=self.world.rank,
            size=self.world.size,
            step=position.step,
            steps=self.plan.total_steps,
            epoch=position.epoch,
            epochs=self.plan.epochs,
            samples=position.samples,
            training=training,
        )
        set_now(self.run.recipe, now)
        return now
