"""The trial of a recipe before the first step: its scores, what it changes, its graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.comm.call_counter import count_calls
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.framework import Split
from hvdtrain.recipe.metrics import MetricMeans, ScoreLayout
from hvdtrain.recipe.now import temporary_now
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.buffers import find_changed_buffers, snapshot_buffers
from hvdtrain.torch.divided_model import DividedModel
from hvdtrain.torch.graph import trace_losses
from hvdtrain.torch.modes import TrainingModes
from hvdtrain.torch.outputs import make_arrays, missing_outputs, split_returned
from hvdtrain.torch.pass_record import PassRecord
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recompute import explain_recompute_errors
from hvdtrain.torch.sandbox import Sandbox, is_lazy_module, open_sandbox, preserve_random_state
from hvdtrain.torch.score_session import SEVERAL_OPTIMIZERS_REFUSAL
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.scores import LossNames, check_scores, find_layout, get_numerators, sum_scores
from hvdtrain.torch.setup import explain_nondeterminism
from hvdtrain.torch.splits import SplitLoaders
from hvdtrain.torch.tensors import named_tensors
from hvdtrain.torch.update import Updater

SUMMED_GRADIENTS = ("HorovodAllreduce", "HorovodGroupedAllreduce", "HorovodAlltoall")  # names of backward functions


@dataclass(frozen=True)
class TrialResult:
    """What a trial has found."""

    layout: ScoreLayout  # of the scores
    means: MetricMeans  # of the scores
    changed_buffers: list[str]  # the names of those that training changes
    calls_collectives: bool  # `score` calls collectives of its own, not of hvdtrain
    exchanges: PassRecord  # by the collectives of hvdtrain that `score` calls


@dataclass(frozen=True)
class Trial:
    """A recipe, and some examples to try it with; nothing of that remains.

    Attributes:
        scorer: of the recipe, of which a copy scores the batch.
        divided: the model that is scored with, as a copy unless ranks hold it together.
        shared: what the copies refer to as it is (`open_sandbox`).
        losses: the scores that are minimized.
        count: the examples of the batch.
        load_batch: returns the batch, of a split, on the model's device.
    """

    scorer: Scorer
    divided: DividedModel
    shared: Sequence[Any]
    losses: LossNames
    count: int
    load_batch: Callable[[Split], Any]

    @property
    def model(self) -> nn.Module:
        """The model that is scored with, as a copy unless ranks hold it together."""
        return self.divided.model

    @functools.cached_property
    def spare_batch(self) -> tuple[Any, int]:
        """The batch in training, and how many examples it has: for passes of a rank without examples."""
        return self.load_batch("train"), self.count

    def _open_sandbox(self) -> AbstractContextManager[Sandbox]:
        return open_sandbox(self.scorer.recipe, self.model, self.shared, in_place=self.divided.is_divided)

    def run(self) -> TrialResult:
        """Score the batch in training mode and make a backward pass; all ranks call it.

        If losses are left out of the first step, a second pass, as in an evaluation, shows all scores.

        Raises:
            UserError: on all ranks, for scores that are not as they should be, or buffers that are replaced.
        """
        batch = collectives.on_all_ranks("trial.batch", lambda: self.load_batch("train"))  # perhaps played by the model
        return collectives.on_all_ranks("trial", lambda: self._run_here(batch))

    @explain_nondeterminism
    @explain_recompute_errors
    def _run_here(self, batch: Any) -> TrialResult:
        recipe, session, losses = self.scorer.recipe, self.scorer.session, self.losses
        if losses.several:
            session.refusal = SEVERAL_OPTIMIZERS_REFUSAL
        with session.record_pass() as exchanges, self._open_sandbox() as sandbox:
            before = snapshot_buffers(sandbox.model)
            with count_calls() as counter:
                explained = self.divided.explain_errors(recipe)
                with explained, self.scorer.autocast_context(), in_recipe(recipe, "score()"):
                    scores, outputs = split_returned(sandbox.recipe.score(sandbox.model, batch))
                all_scores = scores
                if losses.several and not (isinstance(scores, dict) and scores.keys() >= set(losses.names)):
                    all_scores = self._score_as_evaluation(sandbox, batch)
                layout = find_layout(recipe, all_scores, self.count, losses)
                check_scores(recipe, scores, layout, self.count, partial=losses.several)
                found = [get_numerators(scores[name]) for name in losses.names if name in scores]
                reject_averaged_gradients(recipe, found)
                found[0] = session.end_forward(found[0])
                if trained := [values.sum() for values in found if values.requires_grad]:
                    torch.autograd.backward(trained)
            if counter.calls and self.divided.is_divided:
                raise UserError(f"{name_call(recipe, 'score()')} calls collectives, which {self.divided.flag} refuses")
            if is_overridden(recipe, "summarise"):
                self._check_outputs(sandbox, batch, outputs)
            means = layout.means(sum_scores(all_scores, layout).cpu().numpy(), self.count)
            return TrialResult(layout, means, find_changed_buffers(before), counter.calls > 0, exchanges)

    def _score_as_evaluation(self, sandbox: Sandbox, batch: Any) -> Any:
        """Score the batch as an evaluation does, and put the model back into training mode."""
        modes, now = TrainingModes(sandbox.model), replace(sandbox.recipe.now, training=False)
        modes.enter_evaluation()
        with temporary_now(sandbox.recipe, now), self.scorer.autocast_context(), in_recipe(sandbox.recipe, "score()"):
            scores, _ = split_returned(sandbox.recipe.score(sandbox.model, batch))
        modes.leave_evaluation()
        return scores

    def _check_outputs(self, sandbox: Sandbox, batch: Any, outputs: Any) -> None:
        """Raise UserError for outputs of the batch that are not as they should be, or missing.

        outputs: that `score` has returned; None: the recipe computes them.
        """
        recipe, method = self.scorer.recipe, "score()"
        if outputs is None and not is_overridden(recipe, "outputs"):
            raise missing_outputs(recipe)
        if outputs is None:
            method, now = "outputs()", replace(sandbox.recipe.now, training=False)
            sandbox.model.eval()
            with temporary_now(sandbox.recipe, now), self.divided.whole_parameters():
                outputs = self.scorer.call_outputs(sandbox.recipe, sandbox.model, batch)
        make_arrays(name_call(recipe, method), outputs, self.count)

    def trace_graph(self, draw: bool) -> bytes | None:
        """Return the model's graph if it is to be drawn and the batch can be traced; all ranks call it.

        Raises UserError for a recipe that cannot be copied, and whatever tracing raises.
        """
        batch = self.load_batch("train")
        with self._open_sandbox() as sandbox:
            if sandbox.copy_error is not None:
                raise UserError(f"the recipe or its model cannot be copied ({sandbox.copy_error})")
            with temporary_now(sandbox.recipe, replace(sandbox.recipe.now, training=False)):
                return trace_losses(sandbox.recipe, sandbox.model, batch, self.losses.names, draw)

    def join_evaluation_pass(self, split: Split) -> None:
        """Take part in a pass of an evaluation set without an example, by what a trial on this rank exchanges."""
        scorer, records = self.scorer, self.scorer.session.evaluation_records
        if split not in records:
            batch = self.load_batch(split)
            with scorer.session.record_pass() as records[split], self._open_sandbox() as sandbox:
                sandbox.model.eval()
                with torch.no_grad(), scorer.autocast_context(), in_recipe(scorer.recipe, "score()"):
                    sandbox.recipe.score(sandbox.model, batch)
        scorer.session.join_pass(scorer.device, split)


def load_two_examples(scorer: Scorer, splits: SplitLoaders, split: Split = "train") -> Any:
    """Return the first two examples of a split as a batch on the device; random generators stay as they are."""
    with preserve_random_state():
        return scorer.move_batch(splits.load_first_batch(2, split))


def prepare_trial(scorer: Scorer, divided: DividedModel, splits: SplitLoaders, updater: Updater) -> Trial:
    """Return the trial of a recipe with two examples."""
    shared, count = [*splits.datasets.values(), *updater.optimizers.values()], min(2, splits.num_examples["train"])
    return Trial(scorer, divided, shared, updater.loss_names, count, partial(load_two_examples, scorer, splits))


def reject_averaged_gradients(recipe: Recipe, losses: Sequence[torch.Tensor]) -> None:
    """Raise UserError for losses that are differentiated through a collective of Horovod that averages gradients.

    hvdtrain follows the gradient of the sum of all ranks' losses. The backward functions of Horovod's allreduce and
    alltoall do too; those of allgather, broadcast and reducescatter are for losses that are averaged over ranks.
    """
    left, seen = [loss.grad_fn for loss in losses], set[Any]()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [source for source, _ in node.next_functions]
        name = node.name()
        if name.startswith("Horovod") and not name.startswith(SUMMED_GRADIENTS):
            function = name.removeprefix("Horovod").removesuffix("Backward").lower()
            raise UserError(
                f"{type(recipe).__name__}.score differentiates through Horovod's {function}, whose gradient is "
                "averaged over ranks and would depend on their number; use hvdtrain.torch.all_gather"
            )


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
