"""The model in evaluations: the one that is trained, or its average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.comm.world import World
from hvdtrain.recipe.framework import Split
from hvdtrain.recipe.metrics import ScoreLayout
from hvdtrain.torch.changes import ChangeTracker
from hvdtrain.torch.divided_model import DividedModel
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.scores import sum_scores


class Evaluator:
    """Scores batches without training."""

    def __init__(
        self,
        scorer: Scorer,
        divided: DividedModel,
        forward: Any,
        ema: AveragedModel | None,
        changes: ChangeTracker,
        layout: ScoreLayout,
    ) -> None:
        """Evaluate a model.

        Args:
            scorer: calls the recipe's `score`.
            divided: the model that is trained.
            forward: the same, as it is called.
            ema: its average, which is evaluated instead if there is one.
            changes: what a step changes besides the parameters.
            layout: of the scores.
        """
        self.scorer, self.model, self.forward, self.ema, self.changes = scorer, divided.model, forward, ema, changes
        self.layout, self.divided = layout, divided

    def prepare_split(self, split: Split) -> None:
        """Let every rank have the model and its average whole, if an evaluation begins; all ranks call this."""
        if split != "train":
            if self.ema is not None:
                self.ema.gather_average()
            self.divided.gather_parameters()

    def leave_evaluation(self) -> None:
        """Leave the evaluation, if there was one, and free the memory of what other ranks have."""
        self.changes.end_evaluation()
        self.divided.free_parameters()
        if self.ema is not None:
            self.ema.free_average()

    def enter_world(self, world: World) -> None:
        """Continue the training in another world; the last one may have ended in an evaluation."""
        self.leave_evaluation()
        self.divided.enter_world()
        self.changes.set_world_size(world.size)

    def enter_evaluation(self) -> torch.nn.Module:
        """Return the model to evaluate, in the mode and with the values of an evaluation, which begins if none has."""
        if self.changes.start_evaluation() and self.ema is not None:
            self.ema.copy_constants(self.model)
        return self.model if self.ema is None else self.ema.module.eval()

    def _enter_forward(self) -> Any:
        entered = self.enter_evaluation()
        return self.forward if self.ema is None else entered

    def evaluate_batch(self, batch: Any, count: int) -> NDArray[np.float64]:
        """Return (layout.num_sums,) the sums of the scores of a batch of `count` examples."""
        scores = self.scorer.score_for_evaluation(self._enter_forward(), batch, self.layout, count)
        return sum_scores(scores, self.layout).cpu().numpy()

    def compute_outputs(self, batch: Any, count: int) -> Mapping[str, NDArray[Any]]:
        """Return the outputs (count, ...) of the batch that `evaluate_batch` was last called with."""
        return self.scorer.compute_outputs(self._enter_forward(), batch, count)
