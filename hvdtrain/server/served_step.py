"""What a parameter server needs of a framework's Step besides that of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from hvdtrain.recipe.framework import DataSource, Step
from hvdtrain.server.items import Bytes
from hvdtrain.system.errors import UserError

Parts: TypeAlias = Sequence[int] | None  # parameters, by their places in the model; None: all


class ServedStep(Step, Protocol):
    """One rank's model, whose weights come from a server or whose gradients come from workers.

    On a worker, an item is:

        write_weights, start_step, cast_votes and accumulate_gradients for its passes, all_reduce, read_gradients,
        skip_update

    On a server, a version is:

        start_step without passes, add_gradients and add_scores for each item, cast_votes, all_reduce, apply_update
    """

    def find_server_obstacle(self) -> str | None:
        """Return why the recipe cannot be trained by a server, and what to do; None if it can."""

    def parameter_bytes(self, parts: Parts = None) -> list[int]:
        """Return the bytes that each parameter takes in an array of weights or gradients, in their order."""

    def make_array(self, parts: Parts = None) -> Bytes:
        """Return an array that can hold weights, or gradients and which parameters have one."""

    def read_weights(self, into: Bytes, parts: Parts = None) -> None:
        """Copy the parameters."""

    def write_weights(self, weights: Bytes, parts: Parts = None) -> None:
        """Set the parameters."""

    def read_gradients(self, into: Bytes, parts: Parts = None) -> None:
        """Copy the gradients of the step. Raises UserError for a sparse one."""

    def add_gradients(self, gradients: Bytes, factor: float, parts: Parts = None) -> None:
        """Add `factor` times the gradients of a step that was computed elsewhere."""

    def compensate_delay(self, gradients: Bytes, read: Bytes, strength: float, parts: Parts = None) -> None:
        """Add strength * g * g * (w - read) to gradients g, computed with weights `read`; those of now are w."""

    def add_scores(self, sums: NDArray[np.float64], is_finite: bool) -> None:
        """Add the sums of a step's scores that was computed elsewhere, and whether its losses were finite."""

    def take_optimizer_state(self, data: bytes, parts: Sequence[int]) -> None:
        """Take the optimizer's state of these parameters from what another server's `gather_state` has returned."""

    def keep_optimizer_state(self, parts: Sequence[int]) -> None:
        """Forget the optimizer's state of all other parameters."""


def check_served_step(step: Step, recipe: str) -> ServedStep:
    """Return the step, if a server can train it. Raises UserError."""
    found: str | None = None
    if not hasattr(step, "find_server_obstacle"):
        found = "its framework has no flat weights"
    elif step.source is not DataSource.NUMBERED:
        found = "its examples have no numbers, by which a server hands them out; return a dataset with a length"
    elif step.has_sampler:
        found = "its sampler's order may have an example twice; leave out its sampler()"
    elif step.score_uses_collectives or step.score_needs_whole_batch:
        found = "its score calls collectives, and workers do not meet in a step"
    else:
        found = cast(ServedStep, step).find_server_obstacle()
    if found is not None:
        raise UserError(f"--server with {recipe}: {found}")
    return cast(ServedStep, step)
