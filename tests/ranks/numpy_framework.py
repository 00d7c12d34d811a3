"""A framework in numpy, as a package outside hvdtrain would add it: linear models, trained by gradient descent."""

from __future__ import annotations

import io
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe import base
from hvdtrain.recipe.framework import (
    FRAMEWORKS,
    NUM_VOTES,
    Chunk,
    DataSource,
    ExchangeReport,
    Framework,
    Ids,
    Split,
    StepResult,
    StepVotes,
)
from hvdtrain.recipe.metrics import Metric, ScoreLayout
from hvdtrain.recipe.shares import Shares
from hvdtrain.system.errors import UserError


@dataclass(kw_only=True)
class Recipe(base.Recipe):
    """A linear regression: y = x @ weights, with the mean of squared differences as its loss."""

    framework: ClassVar[str] = "numpy"

    @abstractmethod
    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(examples, features) and (examples,): what to predict from, and what to predict."""


class NumpyStep:
    """`hvdtrain.recipe.framework.Step` without any overlap: all numbers travel in one sum at the end."""

    layout = ScoreLayout((Metric("loss"),))
    source = DataSource.NUMBERED
    score_uses_collectives = score_needs_whole_batch = update_in_progress = has_sampler = False
    updates_together = False
    agreement_parts = ()
    gpu_uuid = None
    first_examples: ClassVar[dict[str, str]] = {}

    def __init__(self, recipe: Recipe, world: World, options: StepOptions) -> None:
        if options.rounds.local_steps is not None:
            raise UserError("--local-steps: recipes of numpy exchange gradients in each step: leave it out")
        self.world, self.lr = world, recipe.lr
        self.x, self.y = recipe.arrays()
        self.examples: dict[Split, int] = {"train": len(self.x), "eval": len(self.x)}
        self.weights = np.zeros(self.x.shape[1])
        self.trial_means = self.layout.means(self.evaluate_batch((self.x[:2], self.y[:2]), 2, ()), 2)
        self.votes, self.loss_sum, self.gradient = StepVotes(), 0.0, np.zeros_like(self.weights)

    def find_changed_example(self, earlier: Mapping[str, str]) -> str | None:
        return None

    def base_learning_rate(self) -> float:
        return self.lr

    def trace_graph(self) -> bytes | None:
        return None

    def draw_order(self, seed: int, epoch: int) -> None:
        return None

    def deal_batch(self, shares: Shares) -> None:
        pass

    def load_batches(self, split: Split, chunks: Iterable[Chunk], epoch: int) -> Iterator[tuple[Ids, Any]]:
        for chunk in chunks:
            yield chunk.ids, (self.x[chunk.ids], self.y[chunk.ids])

    def start_step(self, passes: Sequence[int], batch_share: float, is_local: bool, joined: int = 0) -> None:
        self.loss_sum, self.gradient = 0.0, np.zeros_like(self.weights)

    def cast_votes(self, votes: StepVotes) -> None:
        self.votes = votes

    def accumulate_gradients(self, batch: Any, count: int, weight: float, seed: Sequence[int]) -> None:
        x, y = batch
        difference = x @ self.weights - y
        self.loss_sum += float(difference @ difference)
        self.gradient += weight * 2 * difference @ x

    def all_reduce(self) -> StepResult:
        begin = time.perf_counter()
        own = np.concatenate([[self.loss_sum], self.votes.to_vector(), self.gradient])
        total = collectives.sum_float64(own, "numpy.step")
        self.gradient = total[1 + NUM_VOTES :]
        lost = not np.isfinite(total[0])
        votes, waited = StepVotes.from_vector(total[1 : 1 + NUM_VOTES]), time.perf_counter() - begin
        return StepResult(total[:1], votes, lost, (), lost and not np.isfinite(self.loss_sum), waited)

    def apply_update(self, factor: float, seed: Sequence[int]) -> dict[str, float]:
        self.weights -= factor * self.lr * self.gradient
        return {}

    def skip_update(self) -> None:
        pass

    def prune(self, sparsity: float) -> float:
        raise UserError("--prune: the framework numpy cannot")

    def evaluate_batch(self, batch: Any, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
        x, y = batch
        return np.array([np.square(x @ self.weights - y).sum()])

    def evaluated_model(self, seed: Sequence[int]) -> Any:
        return self.weights

    def join_evaluation(self, split: Split) -> None:
        pass

    def compute_outputs(self, batch: Any, count: int) -> Mapping[str, NDArray[Any]]:
        return {"prediction": batch[0] @ self.weights}

    def gather_state(self) -> bytes:
        return self.local_state()

    def local_state(self) -> bytes:
        file = io.BytesIO()
        np.save(file, self.weights)
        return file.getvalue()

    def load_state(self, data: bytes) -> None:
        self.weights = np.load(io.BytesIO(data))

    def checksum_state(self) -> dict[str, int]:
        return {"weights": hash(self.weights.tobytes())}

    def count_compilations(self) -> int | None:
        return None

    def wire_bytes(self) -> int:
        return collectives.ring_all_reduce_bytes(8 * (1 + NUM_VOTES + len(self.weights)), self.world.size)

    def exchange_report(self) -> ExchangeReport:
        return ExchangeReport([], None)

    def take_messages(self) -> list[str]:
        return []

    def exchange_parts(self, reached: int, step: int) -> None:
        pass

    def switch_world(self, world: World) -> None:
        self.world = world

    def close(self) -> None:
        pass


FRAMEWORK = FRAMEWORKS.register("numpy", Framework("numpy", "numpy_framework.Recipe", NumpyStep))
