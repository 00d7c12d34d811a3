"""What the trainer needs of a framework: the small interface behind which torch (and later Keras and JAX) stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdtrain.comm.agreement import ConsistentPart
from hvdtrain.comm.world import World
from hvdtrain.recipe.base import Recipe
from hvdtrain.system.errors import UserError

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
Ids = NDArray[np.int64]
FRAMEWORKS = {"torch": ("hvdtrain.torch.step", "TorchStep")}  # module and class of each one's Step
TOLD = 7  # numbers that each rank tells the others in a step


@dataclass(frozen=True)
class StepResult:
    """What a rank knows after an exchange; the same on each rank but for the last two.

    A step whose losses or gradients are not finite is skipped.
    """

    score_sums: NDArray[np.float64]  # (metrics,): sums of the scores over the global batch
    votes: NDArray[np.float64]  # (TOLD,): what the ranks told, added up
    nonfinite_loss: bool  # a loss of some rank was not finite
    nonfinite_gradients: tuple[str, ...]  # parameters whose gradient, summed over ranks, is not finite
    # These two are this rank's own:
    nonfinite_loss_here: bool
    waited_seconds: float  # seconds waited for communication

    @property
    def must_skip(self) -> bool:
        """Whether the step must not be made."""
        return self.nonfinite_loss or bool(self.nonfinite_gradients)


def check_framework(recipe: type[Recipe]) -> None:
    """Raise UserError if no Step is known for a recipe's framework."""
    if recipe.framework not in FRAMEWORKS:
        names = ", ".join(map(repr, FRAMEWORKS))
        raise UserError(
            f"{recipe.__name__}.framework is {recipe.framework!r}; expected {names}: derive the recipe from "
            "hvdtrain.torch.Recipe"
        )


class Step(Protocol):
    """One rank's model, optimizer and data. A training step is `begin`, `micro_batch` ..., `exchange`, `update`."""

    metrics: tuple[str, ...]  # the scores' names, "loss" first
    examples: dict[Split, int]  # 0 for "eval": no evaluation
    agreement_parts: Sequence[ConsistentPart]  # what has to be the same on all ranks
    first_examples: Mapping[str, str]  # hashes of some training examples, by their names
    score_uses_collectives: bool  # `score` calls collectives of its own, which all ranks must call equally often
    update_in_progress: bool  # an update was begun and not finished: this state is none

    def find_changed_example(self, earlier: Mapping[str, str]) -> str | None:
        """The name of the first training example whose hash is another one than it was; None if there is none."""

    def load_batches(self, split: Split, chunks: Iterable[Ids], epoch: int) -> Iterator[tuple[Ids, Any]]:
        """The batches of these ids, in order, each with the ids that were really loaded.

        `chunks` is read as batches are needed. Of a split, the iterator of the last call only may be used.
        """

    def start_step(self, passes: Sequence[int], part: float, told: NDArray[np.float64]) -> None:
        """Forget the last step's gradients; micro-batches follow.

        passes: how many micro-batches each of this rank's shards has. part: this rank's share of the global batch.
        told: (TOLD,) numbers that travel with the scores' sums, as they are when the last micro-batch is given, or when
        `exchange` is called if there is none.
        """

    def accumulate_gradients(self, batch: Any, count: int, weight: float, seed: Sequence[int]) -> None:
        """Add the gradient of `weight` * the sum of `count` losses; start exchanging what is ready after the last one.

        seed: what randomness in the model is drawn from.
        """

    def all_reduce(self) -> StepResult:
        """Finish exchanging gradients and sums. All ranks call it once per step, also without a micro-batch."""

    def apply_update(self, factor: float, seed: Sequence[int]) -> dict[str, float]:
        """Clip and apply the optimizer at `factor` times its learning rate; what there is to report of it.

        seed: what randomness in the optimizer is drawn from, the same on all ranks.
        """

    def skip_update(self) -> None:
        """Instead of `update`: leave the model as it was before the step, buffers included."""

    def base_learning_rate(self) -> float:
        """The first parameter group's learning rate, before the schedule."""

    def evaluate_batch(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        """Sums of the scores of a batch of `count` examples, without training: (metrics,).

        seed: what randomness in the model is drawn from.
        """

    def gather_state(self) -> bytes:
        """All that the trajectory depends on. All ranks call it; only rank 0's answer is whole."""

    def load_state(self, data: bytes) -> None:
        """Take over a state. Raises UserError if it is not one of this model's and optimizer's."""

    def local_state(self) -> bytes:
        """This rank's state by itself, for ranks that have an older one or none."""

    def switch_world(self, world: World) -> None:
        """Go on in another world, as before the step that was not finished, if there is one."""

    def wire_bytes(self) -> int:
        """Bytes that this rank sends in an exchange."""

    def exchange_report(self) -> dict[str, Any]:
        """How gradients travel: {"buckets": [{"values", "compression", "bytes_sent", ...}], "advisor": its advice}."""

    def take_messages(self) -> list[str]:
        """Lines for people since the last call: what the advisor measured and chose."""

    def checksum_state(self) -> dict[str, int]:
        """Of each tensor of the model's state, by name: a 64-bit number that all of its bits go into."""

    def close(self) -> None:
        """Give back what was taken of the process, the model and the optimizer; the step is of no more use."""

    def trace_graph(self) -> bytes | None:
        """The model as a TensorBoard GraphDef on rank 0, or None for batches that cannot be traced. All ranks call it.

        Raises what tracing does, and UserError for a recipe that cannot be copied.
        """
