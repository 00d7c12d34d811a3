"""What each rank of a replica has of a model in stages, without these ranks: each stage is run here, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hvdtrain.bench.activations import KeptActivations, count_memory
from hvdtrain.recipe.shares import even_shares
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.division import Division, copy_tensors, find_stages, refuse_recipe
from hvdtrain.torch.model_chain import pack_tensors
from hvdtrain.torch.sandbox import Sandbox, open_sandbox
from hvdtrain.torch.stage_cut import cut_graph
from hvdtrain.torch.stages import Stage, StagePlan
from hvdtrain.torch.stand_in import StandIn, note_inputs
from hvdtrain.torch.step import TorchStep
from hvdtrain.torch.trial import prepare_trial


@dataclass(frozen=True)
class StageMemory:
    """What the rank at a place of a replica has.

    Attributes:
        parameters: of its stages.
        model_bytes: of them, and of buffers.
        kept_bytes: what the forward passes keep of the micro-batches that wait for their backward pass.
    """

    parameters: frozenset[nn.Parameter]
    model_bytes: int
    kept_bytes: int


def measure_stages(step: TorchStep, replicas: int) -> list[StageMemory]:
    """Return what each rank of a replica has with the schedule 1f1b. Raises UserError for a model without stages.

    Args:
        step: of the whole model, with the options of a pipeline.
        replicas: that have a part of the batch each.
    """
    recipe, options, pipeline = step.recipe, step.options, step.options.pipeline
    trial = prepare_trial(step.scorer, step.divided, step.splits, step.updater).run()
    refuse_recipe(recipe, step.updater.several, step.source, trial)
    size = options.find_pass_sizes(recipe.batch_size, even_shares(replicas)).training
    shared = [*step.splits.datasets.values(), *step.updater.optimizers.values()]
    division = find_stages(step.scorer, step.model, step.splits, shared, options, size)
    count = pipeline.count_micro_batches(-(-recipe.batch_size // replicas), size)
    with open_sandbox(recipe, step.model, shared) as sandbox:
        kept = measure_kept(step, sandbox, division, size)
    found = []
    for place in range(pipeline.stages):
        links = [link for stage in division.list_own(place, pipeline.stages) for link in stage.links]
        modules = [step.model.get_submodule(link.name) for link in links]
        parameters = frozenset(p for module in modules for p in module.parameters())
        buffers = [b for module in modules for b in module.buffers()]
        waiting = min(count, pipeline.stages - place)  # micro-batches
        found.append(StageMemory(parameters, count_memory([*parameters, *buffers]), kept[place] * waiting))
    return found


def measure_kept(step: TorchStep, sandbox: Sandbox, division: Division, size: int) -> list[int]:
    """Return what each stage keeps of a micro-batch of `size` examples, what it gets and returns included."""
    scorer, recipe, model = step.scorer, sandbox.recipe, sandbox.model
    batch = scorer.move_batch(step.splits.load_first_batch(size))
    found = []
    with scorer.session.refuse_calls(), scorer.autocast_context(), in_recipe(recipe, "score()"):
        passed = copy_tensors(note_inputs(recipe, batch))
        for plan in division.stages:
            stage, kept = Stage(plan, model, scorer), KeptActivations(model)
            with kept.record_forward():
                returned = stage(*passed)
                if plan.is_last:
                    model_here: Any = StandIn(recipe, partial(pack_outputs, plan, returned))
                    recipe.score(model_here, batch)
            kept.add_tensors([*passed, *returned])
            found.append(kept.total_bytes)
            passed = tuple(cut_graph(x) for x in returned)
    return found


def pack_outputs(plan: StagePlan, outputs: Sequence[Tensor], args: tuple[Any, ...]) -> Any:
    """Return the outputs of the last stage as the model returns them for its arguments."""
    return pack_tensors(plan.returned.structure, outputs)
