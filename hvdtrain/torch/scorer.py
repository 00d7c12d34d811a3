"""Calls of a recipe's `score`, in training and in evaluations; and the part of a rank without examples in them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.metrics import ScoreLayout
from hvdtrain.system.errors import RecipeError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.data import to_device
from hvdtrain.torch.outputs import Outputs, make_arrays, missing_outputs, split_returned
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.score_session import ScoreSession, enter_session, find_refusal
from hvdtrain.torch.scores import Scores, check_loss_denominators, check_scores, get_numerators, replace_numerators

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Scorer:
    """Scores batches with a recipe, on its device and with its precision.

    Attributes:
        session: the collectives that `score` calls.
        keeps_outputs: whether what `score` returns next to its scores is kept until the next batch.
    """

    def __init__(self, recipe: Recipe, device: torch.device, options: StepOptions) -> None:
        self.recipe, self.device, self.amp = recipe, device, options.optimization.amp
        self.session = ScoreSession(type(recipe).__name__, find_refusal(options))
        enter_session(self.session)
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.keeps_outputs = is_overridden(recipe, "summarise")
        self._outputs: Any = None  # of the last batch, if `score` has returned any
        self._needs_graph = False  # in evaluations: `score` takes derivatives itself, as of an energy

    def close(self) -> None:
        """Leave the session: there is no training any more."""
        enter_session(None)

    def autocast_context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of --amp to score in."""
        if self.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.amp])

    def move_batch(self, batch: Any) -> Any:
        """Return a batch on the device."""
        return to_device(batch, self.device, self.memory_format)

    def score_for_training(self, model: Any, batch: Any, layout: ScoreLayout, count: int) -> Scores:
        """Return the scores of `count` examples, with their graph."""
        self.session.start_pass(training=True)
        with self.autocast_context():
            scores = self._call_score(model, self.move_batch(batch))
        check_scores(self.recipe, scores, layout, count, partial=layout.several)
        if layout.several:  # which `score` calls no collectives in
            return scores
        tied = self.session.end_forward(get_numerators(scores["loss"]))
        return {**scores, "loss": replace_numerators(scores["loss"], tied)}

    def score_for_evaluation(self, model: Any, batch: Any, layout: ScoreLayout, count: int) -> Scores:
        """Return the scores of `count` examples, without a graph, unless `score` itself needs one."""
        batch = self.move_batch(batch)
        with self.autocast_context():
            scores = self._call_score_without_graph(model, batch)
        check_scores(self.recipe, scores, layout, count)
        check_loss_denominators(self.recipe, scores, layout)
        return scores

    @property
    def has_outputs(self) -> bool:
        """Whether `score` has returned outputs of the last batch."""
        return self._outputs is not None

    def compute_outputs(self, model: Any, batch: Any, count: int) -> Outputs:
        """Return the outputs of the batch that was scored last, in an evaluation; by another pass if need be.

        Raises UserError for outputs that are not arrays (count, ...), and if there is nothing that returns any.
        """
        if self._outputs is not None:
            return make_arrays(name_call(self.recipe, "score()"), self._outputs, count)
        if not is_overridden(self.recipe, "outputs"):
            raise missing_outputs(self.recipe)
        outputs = self.call_outputs(self.recipe, model, self.move_batch(batch))
        return make_arrays(name_call(self.recipe, "outputs()"), outputs, count)

    def call_outputs(self, recipe: Recipe, model: Any, batch: Any) -> Any:
        """Return what `outputs` returns, without gradients or collectives. recipe: this one's, or a copy of it."""
        with self.session.refuse_calls(), torch.no_grad(), self.autocast_context(), in_recipe(recipe, "outputs()"):
            return recipe.outputs(model, batch)

    def _call_score_without_graph(self, model: Any, batch: Any) -> Scores:
        self.session.start_pass(training=False)
        if not self._needs_graph:
            try:
                with torch.no_grad():
                    return self._call_score(model, batch)
            except RecipeError as error:
                if "does not require grad" not in str(error):
                    raise
                self._needs_graph = True
                self.session.start_pass(training=False)
        with torch.enable_grad():
            return self._call_score(model, batch)

    def _call_score(self, model: Any, batch: Any) -> Scores:
        with in_recipe(self.recipe, "score()"):
            returned = self.recipe.score(model, batch)
        scores, outputs = split_returned(returned)
        self._outputs = outputs if self.keeps_outputs else None
        return scores  # type: ignore[no-any-return]
