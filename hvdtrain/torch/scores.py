"""What a recipe's `score` returns: checked and summed.

A score is (B,) or (B, k), or a pair of such numerators and their denominators, (B,) or of the numerators' shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hvdtrain.recipe.metrics import Metric, ScoreLayout, check_column_names
from hvdtrain.system.errors import UserError
from hvdtrain.torch.recipe import Recipe

Scores: TypeAlias = "Mapping[str, Tensor | tuple[Tensor, Tensor]]"  # by name: values, or (numerators, denominators)


@dataclass(frozen=True)
class LossNames:
    """Which scores a recipe minimizes.

    Attributes:
        names: of them.
        several: whether each has an optimizer of its own; then any score may be left out of a training step.
        columns: of metrics.jsonl that there are for each of them, which no other score may have.
    """

    names: tuple[str, ...] = ("loss",)
    several: bool = False
    columns: frozenset[str] = frozenset()


def find_layout(recipe: Recipe, scores: Any, count: int, losses: LossNames = LossNames()) -> ScoreLayout:
    """Return how the scores of `count` examples are summed, the losses first.

    Raises UserError if there is no loss, a name is taken, or a score is not as it should be.
    """
    method = f"{type(recipe).__name__}.score"
    missing = [name for name in losses.names if name not in scores] if isinstance(scores, dict) else losses.names
    if missing and losses.several:
        raise UserError(
            f"{method} must return a dict with {', '.join(map(repr, losses.names))}, one for each optimizer, unless "
            f"self.now.training; in an evaluation it lacks {', '.join(map(repr, missing))}"
        )
    if missing:
        found = f"a dict of {', '.join(map(repr, scores)) or 'nothing'}" if isinstance(scores, dict) else None
        raise UserError(f"{method} must return a dict with 'loss', got {found or describe_value(scores)}")
    names = (*losses.names, *(name for name in scores if name not in losses.names))
    check_column_names(method, names, losses.columns)
    metrics = (_find_metric(recipe, name, scores[name], losses) for name in names)
    layout = ScoreLayout(tuple(metrics), losses.names, losses.several)
    check_scores(recipe, scores, layout, count)
    check_loss_denominators(recipe, scores, layout)
    return layout


def _find_metric(recipe: Recipe, name: str, score: Any, losses: LossNames) -> Metric:
    """Return how a score is summed, by its dimensions only."""
    numerators, denominators = split_score(recipe, name, score)
    is_vector = name not in losses.names and isinstance(numerators, Tensor) and numerators.dim() == 2
    width = numerators.shape[1] if is_vector else None
    if denominators is None:
        return Metric(name, width, int(losses.several), counts_examples=losses.several)
    own_width = width if isinstance(denominators, Tensor) and denominators.dim() == 2 else None
    return Metric(name, width, 1 if own_width is None else own_width)


def split_score(recipe: Recipe, name: str, score: Any) -> tuple[Any, Any]:
    """Return a score's numerators, and its denominators, None if it has none. Raises UserError for another tuple."""
    if not isinstance(score, (tuple, list)):
        return score, None
    if len(score) != 2:
        raise UserError(
            f"{type(recipe).__name__}.score: {name!r} is a {type(score).__name__} of {len(score)}; expected one value "
            "per example, or a pair (numerators, denominators)"
        )
    return score[0], score[1]


def get_numerators(score: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return a score's numerators, with their graph."""
    return score[0] if isinstance(score, (tuple, list)) else score


def weigh_loss(score: Tensor | tuple[Tensor, Tensor], weight: float) -> Tensor:
    """Return what is differentiated of a micro-batch's loss, (). weight: of each example."""
    values = get_numerators(score)
    return values.to(torch.promote_types(values.dtype, torch.float32)).sum() * weight


def replace_numerators(score: Tensor | tuple[Tensor, Tensor], numerators: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Return a score with other numerators."""
    return (numerators, score[1]) if isinstance(score, (tuple, list)) else numerators


def check_scores(recipe: Recipe, scores: Any, layout: ScoreLayout, count: int, partial: bool = False) -> None:
    """Raise UserError unless there is each score and no other, for each of `count` examples, as `layout` has it.

    partial: some may be left out.
    """
    names = set(layout.names)
    if not isinstance(scores, dict) or not (scores.keys() <= names if partial else scores.keys() == names):
        now = ", ".join(scores) if isinstance(scores, dict) else describe_value(scores)
        raise UserError(
            f"{type(recipe).__name__}.score must always return the same scores: first "
            f"{', '.join(layout.names)}, now {now}"
        )
    for metric in (metric for metric in layout.metrics if metric.name in scores):
        numerators, denominators = split_score(recipe, metric.name, scores[metric.name])
        if (denominators is not None) != metric.is_pair:
            now = "a pair" if denominators is not None else "no pair"
            first = "no pair" if denominators is not None else "a pair"
            raise UserError(
                f"{type(recipe).__name__}.score must always return the same scores: {metric.name!r} was {first} first "
                f"and is {now} now"
            )
        shape = (count,) if metric.width is None else (count, metric.width)
        _check_tensor(recipe, metric, numerators, shape)
        if denominators is not None:
            has_vector = metric.num_denominators > 1 or (metric.width == 1 and _is_matrix(denominators))
            _check_tensor(recipe, metric, denominators, shape if has_vector else (count,), "the denominators of ")


def _check_tensor(recipe: Recipe, metric: Metric, value: Any, shape: tuple[int, ...], what: str = "") -> None:
    """Raise UserError unless `value` is a tensor of a shape, of real numbers."""
    where = f"{type(recipe).__name__}.score must return one value per example: {what}{metric.name!r}"
    if not isinstance(value, Tensor) or value.shape != shape or 0 in shape:
        vectors = " or (B, k)" if metric.width is None and metric.name != "loss" and not what else ""
        raise UserError(
            f"{where} should have shape {shape}{vectors} for {shape[0]} examples, got {describe_value(value)}"
        )
    if value.is_complex():
        raise UserError(f"{where} should be real, got {str(value.dtype).removeprefix('torch.')}: take its abs()")


def check_loss_denominators(recipe: Recipe, scores: Scores, layout: ScoreLayout) -> None:
    """Raise UserError if a denominator of a loss is negative."""
    if any(bool((scores[name][1] < 0).any()) for name in layout.loss_denominators):
        raise negative_denominators(recipe, layout)


def negative_denominators(recipe: Recipe, layout: ScoreLayout) -> UserError:
    """Return the error for denominators of a loss that are negative."""
    names = " or ".join(map(repr, layout.loss_denominators))
    return UserError(
        f"{type(recipe).__name__}.score: a denominator of {names} is negative; expected weights of 0 or more, such as "
        "numbers of tokens"
    )


def sum_scores(scores: Scores, layout: ScoreLayout) -> Tensor:
    """Return (layout.num_sums,) float64: numerators, then denominators, summed over the batch."""
    if layout.several:
        return _sum_present_scores(scores, layout)
    parts = [get_numerators(scores[name]) for name in layout.names]
    parts += [scores[metric.name][1] for metric in layout.metrics if metric.num_denominators]
    sums = [part.detach().double().sum(0) for part in parts]
    if len(sums) == layout.num_sums and all(total.dim() == 0 for total in sums):
        return torch.stack(sums)
    return torch.cat([total.reshape(-1) for total in sums])


def _sum_present_scores(scores: Scores, layout: ScoreLayout) -> Tensor:
    """Return (layout.num_sums,) float64, with zeros for scores that were left out."""
    some = get_numerators(next(iter(scores.values())))
    numerators, denominators = [], []
    for metric in layout.metrics:
        if metric.name in scores:
            values = get_numerators(scores[metric.name])
            weights = scores[metric.name][1] if metric.is_pair else some.new_ones(len(values), dtype=torch.float64)
        else:
            values = some.new_zeros(metric.num_numerators, dtype=torch.float64)[None]
            weights = some.new_zeros(metric.num_denominators, dtype=torch.float64)[None]
        numerators.append(values.detach().double().sum(0).reshape(-1))
        denominators.append(weights.detach().double().sum(0).reshape(-1))
    return torch.cat([*numerators, *denominators])


def describe_value(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2
