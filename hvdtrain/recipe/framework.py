"""What training needs of a framework: the interface between the loop and torch, or whatever computes gradients.

A framework is a `Framework`, registered under the name that its recipes have as `framework`: by a module of
hvdtrain.frameworks, or by another package that names it in the entry point group `hvdtrain.frameworks`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.given_order import GivenOrder
from hvdtrain.recipe.metrics import MetricMeans, ScoreLayout
from hvdtrain.recipe.now import Now
from hvdtrain.recipe.order import Ids
from hvdtrain.recipe.results import ExchangeReport as ExchangeReport  # a part of the interface, as those below
from hvdtrain.recipe.results import RoundResult as RoundResult
from hvdtrain.recipe.results import StepResult as StepResult
from hvdtrain.recipe.shares import Shares
from hvdtrain.recipe.votes import NUM_VOTES as NUM_VOTES
from hvdtrain.recipe.votes import StepVotes as StepVotes
from hvdtrain.system.errors import UserError
from hvdtrain.system.plugins import Registry
from hvdtrain.system.text import join_alternatives

if TYPE_CHECKING:
    # A signal that arrives while torch is imported can end the process, and launch imports this module first.
    from hvdtrain.comm.agreement import ConsistentPart
    from hvdtrain.comm.world import World

Split = str  # "train", or one of the recipe's `evals`


class DataSource(enum.Enum):
    """Where training examples come from."""

    NUMBERED = "a dataset, by their numbers in the order of the epoch"
    ROLLOUTS = "the model plays them"
    STREAM = "every rank reads the same stream; ids count its examples"
    DIVIDED_STREAM = "each rank reads its part of a stream; ids count that part's examples"


@dataclass(frozen=True)
class Chunk:
    """Examples to be loaded as one batch: of a training step, or of an evaluation."""

    ids: Ids  # (B,)
    now: Now  # what the recipe's `now` is while they are loaded and scored
    first_index: int  # of the first one, in the step's global batch or in the evaluation set
    first_place: int | None = None  # of the first one, in an order that may have an id several times


class Step(Protocol):
    """One rank's model, optimizer and data.

    All ranks call the methods in the same order:

        made with (recipe, world, options): the same model and data on all ranks, or UserError on all
         |
         +-> deal_batch(shares) if they are, or become, other than even ones
         +-> load_batches("train", ...), once an epoch or a part of it; then for each training step
         |     start_step(passes, batch_share, ...)
         |     accumulate_gradients(batch, ...)       for each micro-batch of this rank but its last one
         |     cast_votes(votes)                      once
         |     accumulate_gradients(batch, ...)       for the last one, if there is any; then the exchange may begin
         |     all_reduce() -> StepResult             all ranks know the same from here on
         |     apply_update(...)                      or skip_update(), if StepResult.must_skip
         |     end_round() -> RoundResult             after the last one of a round of local steps
         |
         +-> between steps: evaluate_batch for each of load_batches(SET, ...), or join_evaluation for a pass without
         |     examples on this rank; gather_state; checksum_state, exchange_report, take_messages, wire_bytes
         +-> in an elastic run, also in the middle of a step: switch_world, then load_state of some rank's local_state,
         |     or rejoin_round, and exchange_parts
         +-> close()
    """

    layout: ScoreLayout  # the scores, and how they are summed
    trial_means: MetricMeans  # of the scores of some examples, before the first step
    examples: dict[Split, int]  # of "train" and of each of the recipe's `evals`; 0: it is not evaluated
    agreement_parts: Sequence[ConsistentPart]  # what has to be the same on all ranks
    first_examples: Mapping[str, str]  # hashes of some training examples, by their names
    source: DataSource
    has_sampler: bool  # the recipe has a method `sampler`
    score_uses_collectives: bool  # `score` calls collectives of its own, which all ranks must call equally often
    score_needs_whole_batch: bool  # `score` exchanges examples by collectives of hvdtrain: a step is one pass
    update_in_progress: bool  # an update was begun and not finished: the state is neither the old nor the new one
    gpu_uuid: str | None  # of the NVIDIA GPU that this rank computes on, "GPU-..."; None: there is none

    @property
    def updates_together(self) -> bool:
        """Whether each rank updates parts that others do not: an update must be made by all, or by none."""

    # What is known before the first step.

    def find_changed_example(self, earlier: Mapping[str, str]) -> str | None:
        """Return the name of the first training example whose hash has changed; None if none has."""

    def base_learning_rate(self) -> float:
        """Return the first parameter group's learning rate, before the schedule."""

    def trace_graph(self) -> bytes | None:
        """Return the model as a TensorBoard GraphDef on rank 0; None for batches that cannot be traced.

        All ranks call it. Raises UserError for a recipe that cannot be copied, and whatever tracing raises.
        """

    def draw_order(self, seed: int, epoch: int) -> GivenOrder | None:
        """Return what the recipe's `sampler` gives for an epoch (from 0) of training; None for a shuffled one.

        Rank 0 calls it. Raises UserError for an invalid order, RecipeError for what the recipe raises.
        """

    # A training step.

    def deal_batch(self, shares: Shares) -> None:
        """From the next step on, until the next world, the ranks' parts of the batch are by these shares."""

    def load_batches(self, split: Split, chunks: Iterable[Chunk], epoch: int) -> Iterator[tuple[Ids, Any]]:
        """Yield the batch of each chunk, in order, with the ids that were really loaded.

        `chunks` is read as batches are needed. Only the iterator of the last call for a split may be used.
        """

    def start_step(self, passes: Sequence[int], batch_share: float, is_local: bool, joined: int = 0) -> None:
        """Forget the last step's gradients and sums.

        Args:
            passes: the number of micro-batches of each of this rank's shards.
            batch_share: this rank's share of the global batch, from 0 to 1.
            is_local: whether this rank's gradients update its own weights, until `end_round`.
            joined: how many more passes other ranks make at most.
        """

    def cast_votes(self, votes: StepVotes) -> None:
        """Take this rank's votes, which are complete: they travel in one collective with the sums of the scores."""

    def accumulate_gradients(self, batch: Any, count: int, weight: float, seed: Sequence[int]) -> None:
        """Add the gradient of `weight` * the sum of the `count` losses of a micro-batch.

        The last one of the step, as counted by `start_step`, may start to exchange votes, sums and gradients.

        Args:
            batch: as `load_batches` has yielded it.
            count: the number of its examples.
            weight: of each example, 1 / the examples of the global batch, in a local step of this rank's part.
            seed: what randomness in the model is drawn from.
        """

    def all_reduce(self) -> StepResult:
        """Finish exchanging gradients, sums and votes; a rank without a micro-batch starts it here."""

    def apply_update(self, factor: float, seed: Sequence[int]) -> dict[str, float]:
        """Clip gradients, and apply the optimizer at `factor` times its learning rate; return what to report of it.

        seed: what randomness in the optimizer is drawn from, the same on all ranks.
        """

    def end_round(self) -> RoundResult:
        """Make all ranks' weights the same again. Raises UserError, RunError: on all ranks."""

    def skip_update(self) -> None:
        """Leave the model as it was before the step, buffers included."""

    def prune(self, sparsity: float) -> float:
        """With --prune, after each step: let this share of the weights be zero for good; return the share that is."""

    # Between steps.

    def evaluate_batch(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        """Return (layout.num_sums,) the sums of the scores of a batch of `count` examples, without training.

        seed: what randomness in the model is drawn from.
        """

    def evaluated_model(self, seed: Sequence[int]) -> Any:
        """Return the model as it was evaluated, for the recipe's `evaluated`; in mode and values as in an evaluation.

        seed: what randomness there is drawn from, the same on all ranks.
        """

    def join_evaluation(self, split: Split) -> None:
        """Take part in a pass of an evaluation in which this rank has no example, but others have."""

    def compute_outputs(self, batch: Any, count: int) -> Mapping[str, NDArray[Any]]:
        """Return the outputs (count, ...) of the batch that `evaluate_batch` was last called with, for `summarise`."""

    def gather_state(self) -> bytes:
        """Return all that the trajectory depends on. All ranks call it; only rank 0's result is whole."""

    def load_state(self, data: bytes) -> None:
        """Take over a state, or `local_state` of a rank at the same place of its replica.

        Raises UserError if it is not of this model and this optimizer.
        """

    def checksum_state(self) -> dict[str, int]:
        """Return a 64-bit checksum of each tensor of the model's state, by name."""

    def count_compilations(self) -> int | None:
        """Return how often a function was compiled in this process; None: nobody counts."""

    def wire_bytes(self) -> int:
        """Return the bytes that this rank sends in an exchange."""

    def exchange_report(self) -> ExchangeReport:
        """Return how gradients travel."""

    def take_messages(self) -> list[str]:
        """Return the lines to print that have come up since the last call."""

    # Another world.

    def local_state(self) -> bytes:
        """Return this rank's state without the help of others, for ranks of its column whose state is older.

        In a round of local steps, parameters are those of its start.
        """

    def rejoin_round(self, data: bytes) -> None:
        """Take of some rank's `local_state` what each step makes the same on all ranks.

        Parameters and the optimizer's state stay those of this rank's steps in the open round.
        """

    def switch_world(self, world: World) -> None:
        """Continue in another world, as before the step that was not finished, if there is one."""

    def exchange_parts(self, reached: int, step: int) -> str | None:
        """Bring each rank its part of what ranks have parts of only; in another world, after `load_state`.

        Args:
            reached: the step that this rank's state had reached before; -1: it had none.
            step: that the state belongs to which was loaded; -1: no rank had any.

        Returns:
            None; or a clause about what no rank has any more, the same on all ranks: only a checkpoint has it.
        """

    def close(self) -> None:
        """Undo what was changed in the process, the model and the optimizer; the step is not used any more."""


class Predictor(Protocol):
    """One rank's model of a finished run, for predictions."""

    def open_examples(self, source: Any) -> int:
        """Load a split of the recipe, by its name, or take a dataset; return the number of its examples.

        All ranks call it. Raises UserError, RecipeError: on all ranks alike.
        """

    def load_batches(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Ids, Any]]:
        """Yield the batch of each chunk of the opened examples, in order."""

    def predict_batch(self, batch: Any, count: int, seed: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return the outputs of a batch of `count` examples, (B, ...) of each. Raises RunError, RecipeError."""

    def close(self) -> None:
        """End loader processes, and leave this process as it was."""


@dataclass(frozen=True)
class Framework:
    """How the recipes of a framework are trained."""

    name: str
    recipe_class: str  # what its recipes derive from, e.g. "hvdtrain.torch.Recipe"
    make_step: Callable[[Any, World, Any], Step]  # from a recipe, its world and exchange.step_options.StepOptions
    # Before a recipe's file is imported: what --backend names, or None.
    prepare_import: Callable[[str | None], None] | None = None
    # Of all ranks, from a new run's step, a file of weights, and whether some may be left out: lines to print.
    load_weights: Callable[[Any, Path, bool], list[str]] | None = None
    # From a recipe, a checkpoint's state, the run's seed and a device: the model, as it was evaluated.
    load_model: Callable[[Any, bytes, int, str], Any] | None = None
    # From a recipe, a checkpoint's state, a world and exchange.step_options.StepOptions.
    make_predictor: Callable[[Any, bytes, World, Any], Predictor] | None = None


FRAMEWORKS: Registry[Framework] = Registry("framework", "hvdtrain.frameworks", "hvdtrain.frameworks")


def find_framework(recipe: type[Recipe]) -> Framework:
    """Return the framework of a recipe. Raises UserError if there is none of that name, or it cannot be loaded."""
    try:
        return FRAMEWORKS.get(recipe.framework)
    except UserError:
        names = FRAMEWORKS.names()
        if recipe.framework in names:
            raise
    classes = join_alternatives([framework.recipe_class for framework in FRAMEWORKS.load_all().values()])
    raise UserError(
        f"{recipe.__name__}.framework is {recipe.framework!r}; expected {', '.join(map(repr, names))}: derive the "
        f"recipe from {classes}"
    )
