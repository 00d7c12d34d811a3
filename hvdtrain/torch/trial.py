"""The trial of a recipe before the first step: its scores, what it changes, its graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.recipe.framework import Split
from hvdtrain.recipe.metrics import MetricMeans, ScoreLayout
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.buffers import find_changed_buffers, snapshot_buffers
from hvdtrain.torch.graph import trace_loss
from hvdtrain.torch.pass_record import PassRecord
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.sandbox import is_lazy_module, open_sandbox
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.scores import find_layout, get_numerators, sum_scores
from hvdtrain.torch.tensors import named_tensors


@dataclass(frozen=True)
class TrialResult:
    """What a trial has found."""

    layout: ScoreLayout  # of the scores
    means: MetricMeans  # of the scores
    changed_buffers: list[str]  # the names of those that training changes
    calls_collectives: bool  # `score` calls collectives of its own, not of hvdtrain
    exchanges: PassRecord  # by the collectives of hvdtrain that `score` calls


def run_trial(scorer: Scorer, model: nn.Module, shared: Sequence[Any], batch: Any, count: int) -> TrialResult:
    """Score a batch in training mode and make a backward pass, on copies.

    Args:
        scorer: of the recipe, of which a copy scores the batch.
        model: scored with, as a copy.
        shared: what the copies refer to as it is (`open_sandbox`).
        batch: on the model's device.
        count: its examples.

    Raises:
        UserError: for scores that are not as they should be, or buffers that are replaced.
    """
    recipe, session = scorer.recipe, scorer.session
    with session.record_pass() as exchanges, open_sandbox(recipe, model, shared) as trial:
        before = snapshot_buffers(trial.model)
        with collectives.count_calls() as counter:
            with scorer.autocast_context(), in_recipe(recipe, "score()"):
                scores = trial.recipe.score(trial.model, batch)
            layout = find_layout(recipe, scores, count)
            if (loss := session.end_forward(get_numerators(scores["loss"]))).requires_grad:
                loss.sum().backward()  # type: ignore[no-untyped-call]
        means = layout.means(sum_scores(scores, layout).cpu().numpy(), count)
        return TrialResult(layout, means, find_changed_buffers(before), counter.calls > 0, exchanges)


def join_evaluation_pass(
    scorer: Scorer, model: nn.Module, shared: Sequence[Any], split: Split, load_batch: Callable[[Split], Any]
) -> None:
    """Take part in a pass of an evaluation without an example, by what a trial on this rank exchanges.

    Args:
        scorer: of the recipe.
        model: copied, as the recipe is.
        shared: what the copies refer to as it is.
        split: the evaluation set.
        load_batch: returns some of its examples, on the model's device; called once for each split.
    """
    records = scorer.session.evaluation_records
    if split not in records:
        batch = load_batch(split)
        with scorer.session.record_pass() as records[split], open_sandbox(scorer.recipe, model, shared) as trial:
            trial.model.eval()
            with torch.no_grad(), scorer.autocast_context(), in_recipe(scorer.recipe, "score()"):
                trial.recipe.score(trial.model, batch)
    scorer.session.join_pass(scorer.device, split)


def trace_model_graph(recipe: Recipe, model: nn.Module, shared: Sequence[Any], batch: Any, rank: int) -> bytes | None:
    """Return the model's graph on rank 0, if the batch can be traced; all ranks call it.

    Raises UserError for a recipe that cannot be copied, and whatever tracing raises.
    """
    with open_sandbox(recipe, model, shared) as trial:
        if trial.copy_error is not None:
            raise UserError(f"the recipe or its model cannot be copied ({trial.copy_error})")
        return trace_loss(trial.recipe, trial.model, batch, draw=rank == 0)


def initialize_lazy_modules(recipe: Recipe, model: nn.Module, make_batch: Callable[[], Any]) -> None:
    """Give lazy modules their shapes by one call of `score`, of which nothing else remains."""
    lazy = [module for module in model.modules() if is_lazy_module(module)]
    if not lazy:
        return
    with open_sandbox(recipe, model, [], in_place=True), torch.no_grad():
        batch = make_batch()
        with in_recipe(recipe, "score()"):
            recipe.score(model, batch)
    for module in lazy:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
    left = [name for name, t in named_tensors(model) if nn.parameter.is_lazy(t)]
    if left:
        raise UserError(
            f"{left[0]} of a lazy module has no shape after a call of {type(recipe).__name__}.score: use it there, or "
            "give its shape"
        )
