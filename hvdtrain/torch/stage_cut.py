"""Where a model is cut into the stages of a pipeline: where its recipe says, or so that stages take about as long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hvdtrain.recipe.base import is_overridden
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.model_chain import Link, call_link
from hvdtrain.torch.recipe import Recipe

NUM_TIMED_PASSES = 5


@dataclass(frozen=True)
class StageCut:
    """The parts of a chain that are stages.

    Attributes:
        ends: of each stage, the number of links that end with it.
        seconds: of each stage, forward and backward, if that decided where to cut.
    """

    ends: tuple[int, ...]
    seconds: tuple[float, ...] = ()

    def list_bounds(self) -> list[tuple[int, int]]:
        """Return the first link of each stage, and the first after it."""
        return list(zip((0, *self.ends), self.ends, strict=False))

    def describe(self, chain: Sequence[Link]) -> str:
        """Return the modules of each stage, for the plan."""
        texts = []
        for number, (first, end) in enumerate(self.list_bounds()):
            names = [link.name for link in chain[first:end]]
            time_taken = f" {self.seconds[number] * 1e3:.1f} ms" if self.seconds else ""
            texts.append((names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}") + time_taken)
        return " | ".join(texts)


def cut_where_asked(recipe: Recipe, model: nn.Module, chain: Sequence[Link], count: int) -> StageCut | None:
    """Return the cut that the recipe's `stages` names; None if it has no such method. Raises UserError."""
    if not is_overridden(recipe, "stages"):
        return None
    with in_recipe(recipe, "stages()"):
        names = recipe.stages(model)
    method = name_call(recipe, "stages()")
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{method} returned {names!r:.60}; expected a list of names of modules, after which to cut")
    ends = []
    for name in names:
        inside = [i for i, link in enumerate(chain, 1) if link.name == name or link.name.startswith(f"{name}.")]
        if not inside:
            raise UserError(
                f"{method} has {name!r}, after which the model cannot be cut; expected some of "
                f"{', '.join(link.name for link in chain[:-1])}"
            )
        ends.append(inside[-1])
    if ends != sorted(set(ends)) or (ends and ends[-1] == len(chain)):
        raise UserError(f"{method} returned {list(names)}; expected each place to cut once, in the order of the model")
    if len(ends) != count - 1:
        raise UserError(
            f"{method} returned {len(ends)} places to cut, and {count} stages need {count - 1}: return so many for "
            "this --stages and --pipeline-schedule"
        )
    return StageCut((*ends, len(chain)))


def cut_evenly(seconds: Sequence[float], count: int) -> StageCut:
    """Return the cut into `count` stages of a chain whose slowest stage is fastest.

    seconds: of each link.
    """
    sums = [0.0]
    for one in seconds:
        sums.append(sums[-1] + one)
    # best[i]: of the first i links in the stages so far, the time of the slowest, and where the last one begins.
    best: list[tuple[float, tuple[int, ...]]] = [(sums[end], (end,)) for end in range(len(sums))]
    for stage in range(1, count):
        best = [
            min(
                (max(best[start][0], sums[end] - sums[start]), (*best[start][1], end))
                for start in range(stage, max(end, stage + 1))
            )
            if end > stage
            else (float("inf"), ())
            for end in range(len(sums))
        ]
    ends = best[-1][1]
    return StageCut(ends, tuple(sums[end] - sums[first] for first, end in zip((0, *ends), ends, strict=False)))


def time_links(chain: Sequence[Link], model: nn.Module, args: tuple[Any, ...]) -> list[float]:
    """Return the seconds of each link, forward and backward, for a batch."""
    found: list[list[float]] = [[] for _ in chain]
    for _ in range(NUM_TIMED_PASSES):
        value: Any = args
        for link, seconds in zip(chain, found, strict=True):
            value = tree_map_only(Tensor, cut_graph, value)
            given = tree_map_only(Tensor, lambda x: x.clone(), value) if link.writes else value
            begin = wait_and_read_clock(args)
            value = call_link(link, model.get_submodule(link.name), given)
            if outputs := [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.requires_grad]:
                torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])
            seconds.append(wait_and_read_clock(args) - begin)
    return [median(seconds[1:]) for seconds in found]


def cut_graph(x: Tensor) -> Tensor:
    """Return a tensor without the graph that it came from."""
    return x.detach().requires_grad_(x.requires_grad)


def wait_and_read_clock(args: tuple[Any, ...]) -> float:
    """Return the time once a GPU, if tensors are on one, has done its work."""
    if any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(args)):
        torch.cuda.synchronize()
    return time.perf_counter()
