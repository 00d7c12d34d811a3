"""What is known of a step's model and data before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvdtrain.comm.agreement import ConsistentPart
from hvdtrain.comm.world import World
from hvdtrain.recipe.given_order import GivenOrder
from hvdtrain.torch.consistency import find_changed_hash, select_examples
from hvdtrain.torch.splits import SplitLoaders
from hvdtrain.torch.trial import Trial
from hvdtrain.torch.update import Updater


class StepFacts:
    """The part of `hvdtrain.recipe.framework.Step` that makes no step."""

    world: World
    splits: SplitLoaders
    updater: Updater
    agreement_parts: Sequence[ConsistentPart]
    score_needs_whole_batch: bool
    _trial: Trial

    def find_changed_example(self, earlier: Mapping[str, str]) -> str | None:
        return find_changed_hash(select_examples(self.agreement_parts), earlier)

    def base_learning_rate(self) -> float:
        return self.updater.losses[0].base_lrs[0]

    def trace_graph(self) -> bytes | None:
        # Of a batch that is needed whole, each rank has a part only.
        return None if self.score_needs_whole_batch else self._trial.trace_graph(draw=self.world.rank == 0)

    def draw_order(self, seed: int, epoch: int) -> GivenOrder | None:
        return self.splits.draw_order(seed, epoch)

    def count_compilations(self) -> int | None:
        return None
