"""What a recipe's `score` returns: checked and summed."""

from __future__ import annotations

from typing import Any

import torch

from hvdtrain.recipe.metrics import Metric, ScoreLayout
from hvdtrain.system.errors import UserError
from hvdtrain.torch.recipe import Recipe

# Keys of metrics.jsonl that the recipe's metrics cannot have.
RESERVED_COLUMNS = {"step", "epoch", "samples", "lr", "samples_per_second", "comm_seconds"}
RESERVED_COLUMNS |= {"gradient_norm", "loss_scale", "skipped"}


def find_layout(recipe: Recipe, scores: Any) -> ScoreLayout:
    """Return how the scores are summed, "loss" first. Raises UserError if there is no loss, or a name is taken."""
    if not isinstance(scores, dict) or "loss" not in scores:
        raise UserError(f"{type(recipe).__name__}.score must return a dict with 'loss', got {describe_value(scores)}")
    names = ("loss", *(name for name in scores if name != "loss"))
    taken = sorted(set(names) & RESERVED_COLUMNS)
    if taken:
        raise UserError(f"{type(recipe).__name__}.score: {taken[0]!r} is a column of metrics.jsonl; rename it")
    return ScoreLayout(tuple(Metric(name) for name in names))


def check_scores(recipe: Recipe, scores: dict[str, torch.Tensor], layout: ScoreLayout, count: int) -> None:
    """Raise UserError unless there is each metric and no other, with one value for each of `count` examples."""
    if scores.keys() != set(layout.names):
        raise UserError(
            f"{type(recipe).__name__}.score must always return the same scores: first "
            f"{', '.join(layout.names)}, now {', '.join(scores)}"
        )
    for name, score in scores.items():
        if not isinstance(score, torch.Tensor) or score.shape != (count,):
            raise UserError(
                f"{type(recipe).__name__}.score must return one value per example: {name!r} should have "
                f"shape ({count},) for {count} examples, got {describe_value(score)}"
            )


def sum_scores(scores: dict[str, torch.Tensor], layout: ScoreLayout) -> torch.Tensor:
    """Return (layout.num_sums,) float64: each score summed over the batch."""
    return torch.stack([scores[name].detach().double().sum() for name in layout.names])


def describe_value(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
