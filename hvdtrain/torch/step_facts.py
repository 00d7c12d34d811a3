"""What is known of a step's model, data and exchange between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import ConsistentPart
from hvdtrain.comm.world import World
from hvdtrain.recipe.framework import ExchangeReport, Split
from hvdtrain.recipe.given_order import GivenOrder
from hvdtrain.torch.changes import ChangeTracker
from hvdtrain.torch.consistency import find_changed_hash, select_examples
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.divided_model import DividedModel
from hvdtrain.torch.evaluator import Evaluator
from hvdtrain.torch.recipe_state import RecipeState
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.setup import explain_nondeterminism
from hvdtrain.torch.splits import SplitLoaders
from hvdtrain.torch.sums import StepSums
from hvdtrain.torch.tensors import checksum_model
from hvdtrain.torch.trial import Trial
from hvdtrain.torch.update import Updater


class StepFacts:
    """The part of `hvdtrain.recipe.framework.Step` that makes no step."""

    world: World
    splits: SplitLoaders
    updater: Updater
    scorer: Scorer
    changes: ChangeTracker
    sums: StepSums
    divided: DividedModel
    agreement_parts: Sequence[ConsistentPart]
    score_needs_whole_batch: bool
    tables: DealtTables | None
    model: nn.Module
    recipe_state: RecipeState
    evaluator: Evaluator
    _trial: Trial
    _messages: list[str]

    @property
    def updates_together(self) -> bool:
        """Whether each rank updates parts of the model that others do not."""
        return self.tables is not None

    def find_changed_example(self, earlier: Mapping[str, str]) -> str | None:
        return find_changed_hash(select_examples(self.agreement_parts), earlier)

    def base_learning_rate(self) -> float:
        return self.updater.losses[0].base_lrs[0]

    def trace_graph(self) -> bytes | None:
        # Of a batch that is needed whole, or of a model, each rank has a part only.
        is_part = self.score_needs_whole_batch or self.divided.is_divided or self.tables is not None
        return None if is_part else self._trial.trace_graph(draw=self.world.rank == 0)

    def draw_order(self, seed: int, epoch: int) -> GivenOrder | None:
        return self.splits.draw_order(seed, epoch)

    def count_compilations(self) -> int | None:
        return None

    @explain_nondeterminism
    def evaluate_batch(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        seed_all(seed)
        return self.evaluator.evaluate_batch(batch, count)

    def compute_outputs(self, batch: Any, count: int) -> Mapping[str, NDArray[Any]]:
        return self.evaluator.compute_outputs(batch, count)

    def evaluated_model(self, seed: Sequence[int]) -> torch.nn.Module:
        seed_all(seed)
        self.recipe_state.snapshot()
        self.scorer.session.start_pass(training=False)
        return self.evaluator.enter_evaluation()  # which a rank without an example of it has not done

    def join_evaluation(self, split: Split) -> None:
        self._trial.join_evaluation_pass(split)

    def checksum_state(self) -> dict[str, int]:
        self.recipe_state.forget_snapshot()
        self.evaluator.leave_evaluation()
        own = self.changes.buffer_reducer.local_names
        leave_out = {*own, *(() if self.tables is None else self.tables.parameters)}
        return checksum_model(self.model, leave_out=leave_out)

    def wire_bytes(self) -> int:
        small = self.changes.buffer_reducer.payload_bytes + self.sums.num_bytes
        own = self.updater.wire_bytes + self.scorer.session.bytes_sent
        return own + collectives.ring_all_reduce_bytes(small, self.world.size)

    def exchange_report(self) -> ExchangeReport:
        return self.updater.describe_exchange()

    def take_messages(self) -> list[str]:
        lines, self._messages[:] = list(self._messages), []
        return lines
