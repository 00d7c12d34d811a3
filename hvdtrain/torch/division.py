"""How a model is divided into stages: found out with two examples before the first step, on all ranks alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from hvdtrain.comm import collectives
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.framework import DataSource
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.model_chain import Link, Passed, check_examples, find_chain, resize_passed, run_chain
from hvdtrain.torch.outputs import split_returned
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.sandbox import Sandbox, open_sandbox
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.scores import get_numerators
from hvdtrain.torch.splits import SplitLoaders
from hvdtrain.torch.stage_cut import StageCut, cut_evenly, cut_where_asked, time_links
from hvdtrain.torch.stages import StagePlan, find_shared_buffers, find_shared_parameters
from hvdtrain.torch.stand_in import StandIn, note_inputs
from hvdtrain.torch.tensors import has_same_bits
from hvdtrain.torch.trial import TrialResult, load_two_examples

REFUSED_METHODS = {  # that a recipe may have
    "evaluated": "is given the whole model after an evaluation",
    "state": "is remembered on the first stage's rank, and scores are computed on the last one's",
}
SEED = (0, -1)  # of what is drawn while the model is tried


@dataclass(frozen=True)
class Division:
    """The stages of a model.

    Attributes:
        stages: all of them.
        shared: the parameters that several stages have, by their first name, with these stages.
        text: of the cut, for the plan.
    """

    stages: Sequence[StagePlan]
    shared: dict[str, list[int]]
    text: str

    def resize(self, size: int) -> Division:
        """Return the division with micro-batches of `size` examples."""
        stages = [
            replace(stage, given=resize_passed(stage.given, size), returned=resize_passed(stage.returned, size))
            for stage in self.stages
        ]
        return replace(self, stages=stages)

    def list_own(self, place: int, ranks: int) -> list[StagePlan]:
        """Return the stages of the rank at a place in its replica: each of so many ranks has every so-manieth."""
        return [stage for stage in self.stages if stage.number % ranks == place]


@dataclass(frozen=True)
class Tried:
    """A model's chain, and what it was tried with."""

    chain: list[Link]
    inputs: Passed
    count: int  # of the examples


def find_stages(
    scorer: Scorer, model: nn.Module, splits: SplitLoaders, shared: Sequence[Any], options: StepOptions, size: int
) -> Division:
    """Return how a model is divided; all ranks call this.

    Args:
        scorer: of the recipe.
        model: whole.
        splits: the data.
        shared: what a copy of the recipe refers to as it is (`open_sandbox`).
        options: of the run.
        size: examples of a micro-batch.

    Raises:
        UserError: on all ranks, for a model that cannot be cut, or a `score` that cannot do with stages.
    """
    recipe = scorer.recipe
    batch, count = load_two_examples(scorer, splits), min(2, splits.num_examples["train"])

    def try_here() -> Tried:
        refuse_batch_norm(model)
        with open_sandbox(recipe, model, shared) as sandbox, scorer.session.refuse_calls():
            return try_model(scorer, sandbox, batch, count)

    tried = collectives.on_all_ranks("pipeline.trial", try_here)
    wanted = options.pipeline.stages * options.pipeline.stages_per_rank

    def cut_on_root() -> list[list[float]]:
        cut = cut_where_asked(recipe, model, tried.chain, wanted)
        if cut is None:
            check_chain_length(recipe, tried.chain, wanted)
            with open_sandbox(recipe, model, shared) as sandbox, scorer.session.refuse_calls():
                cut = cut_evenly(time_model(scorer, sandbox, tried, splits.load_first_batch(size)), wanted)
        return [list(cut.ends), list(cut.seconds)]

    ends, seconds = collectives.on_root("pipeline.cut", cut_on_root)
    cut = StageCut(tuple(int(end) for end in ends), tuple(seconds))
    return collectives.on_all_ranks("pipeline.stages", lambda: plan_stages(recipe, model, tried, cut, size))


def refuse_recipe(recipe: Recipe, several: bool, source: DataSource, trial: TrialResult) -> None:
    """Raise UserError for a recipe that stages cannot train, or not exactly. several: whether it has several losses."""
    name = type(recipe).__name__
    if several:
        raise UserError(f"--stages: {name}.optimizer returns several optimizers; a pipeline minimizes one loss")
    if trial.exchanges.calls or trial.calls_collectives:
        raise UserError(f"--stages: {name}.score calls collectives, and only the last stages compute scores")
    if trial.changed_buffers:
        raise UserError(
            f"--stages: training changes the buffer {trial.changed_buffers[0]!r}, with what micro-batches are "
            "filled up with; use layers without such buffers, GroupNorm for instance"
        )
    if source is not DataSource.NUMBERED:
        raise UserError(
            f"--stages: {name}.dataset('train') is no list of examples; streams and rollouts need whole models"
        )
    for method, reason in REFUSED_METHODS.items():
        if is_overridden(recipe, method):
            raise UserError(f"--stages: {name}.{method} {reason}; leave out the method, or --stages")


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise UserError for layers that look at all examples of a pass, some of which are filled in."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise UserError(
                f"--stages: {name!r} is a {type(module).__name__}, whose statistics would be those of each "
                "micro-batch, with what it is filled up with; use GroupNorm or LayerNorm"
            )


def check_chain_length(recipe: Recipe, chain: Sequence[Link], wanted: int) -> None:
    """Raise UserError if a chain has fewer modules than there are to be stages."""
    if len(chain) < wanted:
        names = ", ".join(link.name for link in chain)
        raise UserError(
            f"--stages: the model of {type(recipe).__name__} is a chain of {len(chain)} modules ({names}), and "
            f"{wanted} stages need as many: ask for fewer stages, or write larger modules as chains"
        )


def try_model(scorer: Scorer, sandbox: Sandbox, batch: Any, count: int) -> Tried:
    """Return the chain of a model. Raises UserError for a `score` or model that cannot be cut, or not exactly."""
    recipe, model, name = sandbox.recipe, sandbox.model, type(sandbox.recipe).__name__
    with scorer.autocast_context(), in_recipe(recipe, "score()"):
        seed_all(SEED)
        inputs = note_inputs(recipe, batch)
        results: list[Any] = []
        seed_all(SEED)
        chain = find_chain(model, lambda: results.append(model(*copy_tensors(inputs))), f"the model of {name}")
        seed_all(SEED)
        again = run_chain(chain, model, copy_tensors(inputs))
        check_same(name, results[0], again)
        outputs = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), results[0])
        seed_all(SEED)
        scores, _ = split_returned(recipe.score(StandIn(recipe, lambda args: outputs), batch))  # type: ignore[arg-type]
    loss = get_numerators(scores["loss"]).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    if not loss.requires_grad or not (leaves := [x for x in tree_leaves(outputs) if x.requires_grad]):
        raise UserError(f"--stages: the loss of {name}.score does not depend on what the model returns")
    found = torch.autograd.grad(loss, [*leaves, *trained], allow_unused=True)
    if all(x is None for x in found[: len(leaves)]):
        raise UserError(f"--stages: the loss of {name}.score does not depend on what the model returns")
    if past := [p for p, x in zip(trained, found[len(leaves) :], strict=True) if x is not None]:
        names = {p: own for own, p in model.named_parameters()}
        raise UserError(
            f"--stages: {name}.score uses the parameter {names[past[0]]!r} apart from its call of the model, and only "
            "one stage has it; use what the model returns"
        )
    flat, structure = tree_flatten(inputs)
    metas = tuple(torch.empty_like(x, device="meta") for x in flat)
    return Tried(chain, Passed(structure, metas), count)


def copy_tensors(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return copies, which a model may write into."""
    return tuple(x.detach().clone() for x in inputs)


def check_same(name: str, one: Any, other: Any) -> None:
    """Raise UserError unless a model and its chain have returned the same."""
    left, right = tree_leaves(one), tree_leaves(other)
    if len(left) != len(right) or not all(
        has_same_bits(a.detach(), b.detach()) for a, b in zip(left, right, strict=True)
    ):
        raise UserError(
            f"--stages: the modules of {name}'s model, called one after the other, do not return what the model does; "
            "write its forward so, and draw what is random in a module"
        )


def time_model(scorer: Scorer, sandbox: Sandbox, tried: Tried, batch: Any) -> list[float]:
    """Return the seconds of each link of a chain for a micro-batch."""
    with scorer.autocast_context(), in_recipe(sandbox.recipe, "score()"):
        inputs = note_inputs(sandbox.recipe, scorer.move_batch(batch))
        return time_links(tried.chain, sandbox.model, copy_tensors(inputs))


def plan_stages(recipe: Recipe, model: nn.Module, tried: Tried, cut: StageCut, size: int) -> Division:
    """Return the stages of a cut model, with what passes between them of a micro-batch of `size` examples."""
    chain, name = tried.chain, type(recipe).__name__
    check_examples(tried.inputs, tried.count, f"what {name}.score gives the model")
    given = resize_passed(tried.inputs, size)
    stages = []
    for number, (first, end) in enumerate(cut.list_bounds()):
        last = chain[end - 1]
        check_examples(last.returned, tried.count, f"what {last.name!r} returns")
        returned = resize_passed(last.returned, size)
        if end < len(chain) and not returned.has_gradient:
            raise UserError(
                f"--stages: nothing that is trained comes before the cut after {last.name!r}; cut later, by "
                f"{name}.stages(self, model), or leave out --stages"
            )
        stages.append(StagePlan(number, len(cut.ends), chain[first:end], given, returned))
        given = returned
    parts = [[link.name for link in stage.links] for stage in stages]
    if names := find_shared_buffers(model, parts):
        raise UserError(f"--stages: the buffer {names[0]!r} is in two stages; give each its own")
    return Division(stages, find_shared_parameters(model, parts), cut.describe(chain))
