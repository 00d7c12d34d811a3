"""A rank's stages of a model that is cut: what of the model the rank keeps, and how torch's pipelining calls it.

A rank's part of the model is the model itself without the modules of other ranks: names of parameters, the modes of
modules, the average of --ema and the optimizer's groups stay what they are in the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.model_chain import Link, Passed, call_link, pack_tensors
from hvdtrain.torch.scorer import Scorer


@dataclass(frozen=True)
class StagePlan:
    """A stage of a pipeline.

    Attributes:
        number: of it.
        count: of all.
        links: its part of the model's chain.
        given: what it gets, of a micro-batch.
        returned: what it returns.
    """

    number: int
    count: int
    links: Sequence[Link]
    given: Passed
    returned: Passed

    @property
    def is_first(self) -> bool:
        """Whether it gets the model's inputs."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it returns the model's outputs."""
        return self.number == self.count - 1


class Stage(nn.Module):
    """What torch's pipelining takes for a stage: tensors -> tuple of tensors.

    Attributes:
        seed: of the micro-batch's randomness, set before each call.
    """

    def __init__(self, plan: StagePlan, model: nn.Module, scorer: Scorer) -> None:
        super().__init__()
        self.plan, self.scorer = plan, scorer
        self.parts = nn.ModuleList(model.get_submodule(link.name) for link in plan.links)
        self.seed: Sequence[int] = ()
        self.copies_inputs = not plan.is_first and any(link.writes for link in plan.links)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return what the stage's last module returns, for what its first one gets."""
        if self.copies_inputs:  # autograd lets nobody write into its leaves
            tensors = tuple(x.clone() for x in tensors)
        value: Any = tensors if self.plan.is_first else pack_tensors(self.plan.given.structure, tensors)
        with self.scorer.autocast_context(), in_recipe(self.scorer.recipe, "score()"):
            for link, part in zip(self.plan.links, self.parts, strict=True):
                seed_all((*self.seed, link.number))  # so that randomness does not depend on the cut
                value = call_link(link, part, value)
        # What is passed on as it came gets a place in the graph of its own, through which its derivative goes back.
        given = {id(x) for x in tensors}
        returned = [x.clone() if id(x) in given else x for x in tree_leaves(value)]
        return tuple(returned if self.plan.is_last else [x.contiguous() for x in returned])


def make_example(passed: Passed, device: torch.device) -> tuple[Tensor, ...]:
    """Return tensors like those that are passed on, for torch to know their shapes."""
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=device).requires_grad_(x.requires_grad) for x in passed.tensors
    )


def keep_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Take the modules that are not in those of these names out of a model, with what they hold."""
    kept = {id(inner) for name in names for inner in model.get_submodule(name).modules()}
    around = {name.rpartition(".")[0] for name in names}
    for parent in list(around):
        while parent:
            parent = parent.rpartition(".")[0]
            around.add(parent)
    kept |= {id(model.get_submodule(name)) for name in around}
    for module in list(model.modules()):
        if id(module) in kept:
            for key, child in list(module._modules.items()):
                if child is not None and id(child) not in kept:
                    del module._modules[key]


def find_shared_parameters(model: nn.Module, parts: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Return the parameters that several parts of a model have, by their first name, with the parts' numbers.

    parts: the names of the modules of each.
    """
    owners: dict[int, list[int]] = {}
    for number, names in enumerate(parts):
        for p in {id(p): p for name in names for p in model.get_submodule(name).parameters()}.values():
            owners.setdefault(id(p), []).append(number)
    return {name: owners[id(p)] for name, p in model.named_parameters() if len(owners.get(id(p), [])) > 1}


def find_shared_buffers(model: nn.Module, parts: Sequence[Sequence[str]]) -> list[str]:
    """Return the names of buffers that several parts of a model have; arguments as for `find_shared_parameters`."""
    owners: dict[int, set[int]] = {}
    for number, names in enumerate(parts):
        for b in (b for name in names for b in model.get_submodule(name).buffers()):
            owners.setdefault(id(b), set()).add(number)
    return [name for name, b in model.named_buffers() if len(owners.get(id(b), ())) > 1]


def keep_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Take the parameters that are not in a model any more out of an optimizer; its groups keep their settings."""
    own = set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p in own]
    state: Any = optimizer.state
    for p in [p for p in state if isinstance(p, Tensor) and p not in own]:
        del state[p]
