"""Scores as sums: a metric is computed once, of sums over all examples and all ranks.

The sums of a batch are a vector, which is added over batches and over ranks, (num_sums,) float64:

    numerators of each score: 1, or k of a vector  |  denominators of the scores that have their own: 1 or k each
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hvdtrain.system.errors import UserError
from hvdtrain.system.gpu import GPU_COLUMNS

MetricMeans = dict[str, np.float64 | NDArray[np.float64]]  # by score: a number, or (k,) of a vector
MetricValue = float | list[float]  # the same as plain data, as it is written and sent to other ranks


# Columns of metrics.jsonl that the recipe's metrics cannot have.
RESERVED_COLUMNS = {"step", "epoch", "samples", "lr", "samples_per_second", "comm_seconds"}
RESERVED_COLUMNS |= {"gradient_norm", "loss_scale", "skipped"} | GPU_COLUMNS


def check_column_names(where: str, names: Iterable[object], more: Collection[str] = ()) -> None:
    """Raise UserError for a metric's name that is not a string, or that a column has already.

    Args:
        where: the method that returned them.
        names: of metrics.
        more: columns that only some runs have.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: {name!r} is not a valid name of a metric; expected a string")
        if name in RESERVED_COLUMNS or name in more:
            raise UserError(f"{where}: {name!r} is a column of metrics.jsonl; rename it")


@dataclass(frozen=True)
class Metric:
    """How a score is summed.

    Attributes:
        name: of the score.
        width: k of a score with k values per example, (B, k); None for one value per example, (B,).
        num_denominators: sums of its own denominators: 1 of (B,), k of (B, k); 0: it is divided by the examples.
        counts_examples: its denominators are 1 for each example that has it, and the recipe gives none.
    """

    name: str
    width: int | None = None
    num_denominators: int = 0
    counts_examples: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether the recipe gives denominators with it."""
        return self.num_denominators > 0 and not self.counts_examples

    @property
    def num_numerators(self) -> int:
        return 1 if self.width is None else self.width

    def describe(self) -> str:
        """Return its name and what differs from one value per example: `counts (B, 3) / (B,)`."""
        if self.width is None:
            return f"{self.name} (B,) / (B,)" if self.is_pair else self.name
        shape = f"{self.name} (B, {self.width})"
        if not self.is_pair:
            return shape
        return f"{shape} / {'(B,)' if self.num_denominators == 1 else f'(B, {self.width})'}"


@dataclass(frozen=True)
class ScoreLayout:
    """What a recipe's scores are, in the order of their sums; those that are minimized come first.

    Attributes:
        metrics: the scores.
        losses: the names of those that are minimized.
        several: whether each of them has an optimizer of its own; then any score may be left out of a training step.
    """

    metrics: tuple[Metric, ...]
    losses: tuple[str, ...] = ("loss",)
    several: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The scores' names."""
        return tuple(metric.name for metric in self.metrics)

    @cached_property
    def num_numerators(self) -> int:
        return sum(metric.num_numerators for metric in self.metrics)

    @cached_property
    def num_sums(self) -> int:
        """How many float64 numbers the sums are."""
        return self.num_numerators + sum(metric.num_denominators for metric in self.metrics)

    def means(self, sums: NDArray[np.float64], count: int) -> MetricMeans:
        """Return each score's sum of numerators by its sum of denominators; NaN or infinite by a sum of 0.

        Args:
            sums: (num_sums,) over `count` examples.
            count: the denominator of the scores that have none of their own.
        """
        found: MetricMeans = {}
        with np.errstate(divide="ignore", invalid="ignore"):
            for metric, numerators, denominators in self._locate():
                totals = sums[numerators] / (sums[denominators] if metric.num_denominators else np.float64(count))
                found[metric.name] = totals[0] if metric.width is None else totals
        if "loss" not in found:
            trained = [found[name] for name, _, own in self._locate_losses() if sums[own]]
            found = {"loss": np.float64(sum(trained) if trained else np.nan), **found}
        return found

    def numerator(self, sums: NDArray[np.float64], name: str) -> float:
        """Return the sum over examples of a score that has one value per example."""
        return next(float(sums[place][0]) for metric, place, _ in self._locate() if metric.name == name)

    @cached_property
    def loss_denominators(self) -> dict[str, int]:
        """The places in the sums of those losses' denominators that the recipe gives, by the losses' names."""
        pairs = {metric.name for metric in self.metrics if metric.is_pair}
        return {name: own for name, _, own in self._locate_losses() if name in pairs}

    def loss_factors(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        """Return, of each loss with denominators that are given, `count` examples / their sum; 0 if that is 0."""
        return {name: count / float(sums[own]) if sums[own] else 0.0 for name, own in self.loss_denominators.items()}

    def loss_sums(self, sums: NDArray[np.float64], count: int) -> tuple[float, float]:
        """Return the sum of a step's losses, and what it is divided by: their own denominators, or `count` examples.

        Several losses, each of which may have denominators of its own, are added up as means.
        """
        if self.several:
            is_there = any(sums[own] for _, _, own in self._locate_losses())
            return (float(self.means(sums, count)["loss"]) * count, float(count)) if is_there else (0.0, 0.0)
        ((_, place, own),) = self._locate_losses()
        return float(sums[place]), float(sums[own] if self.loss_denominators else count)

    def describe(self) -> str:
        """Return all scores, to be compared with those of other ranks or of an earlier run."""
        return ", ".join(metric.describe() for metric in self.metrics)

    def _locate_losses(self) -> Iterator[tuple[str, int, int]]:
        """Yield each loss's name and the places of its numerator and, if it has one, of its denominator in the sums."""
        for metric, numerators, denominators in self._locate():
            if metric.name in self.losses:
                yield metric.name, numerators.start, denominators.start

    def _locate(self) -> Iterator[tuple[Metric, slice, slice]]:
        """Yield each score with the places of its numerators and of its denominators in the sums."""
        first, own = 0, self.num_numerators
        for metric in self.metrics:
            end, own_end = first + metric.num_numerators, own + metric.num_denominators
            yield metric, slice(first, end), slice(own, own_end)
            first, own = end, own_end


def to_plain_values(means: MetricMeans) -> dict[str, MetricValue]:
    """Return metrics as plain data: a float, or a list of floats for a vector."""
    return {name: value.tolist() for name, value in means.items()}


def select_scalars(values: Mapping[str, MetricValue]) -> dict[str, float]:
    """Return the metrics that are one number, which can be printed, plotted and compared."""
    return {name: value for name, value in values.items() if not isinstance(value, list)}


def format_values(values: Mapping[str, MetricValue]) -> str:
    """Return the metrics that are one number, human-readable."""
    return "  ".join(f"{name} {value:.4f}" for name, value in select_scalars(values).items())
