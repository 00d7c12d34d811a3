"""A step whose weights come from a parameter server, or whose gradients come from its workers.

Weights and gradients travel as one array of bytes: each parameter's values in its own type, at a multiple of ALIGNMENT;
behind them a byte for each parameter that is 1 if it has a gradient, as an optimizer skips those without.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.changes import ChangeTracker
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recipe_state import RecipeState
from hvdtrain.torch.sums import StepSums
from hvdtrain.torch.tensors import read_tensors
from hvdtrain.torch.update import Updater

ALIGNMENT = 16
Parts: TypeAlias = Sequence[int] | None  # parameters, by their places; None: all
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class ServedPart:
    """The part of `hvdtrain.server.served_step.ServedStep` that other steps do not have."""

    recipe: Recipe
    recipe_state: RecipeState
    updater: Updater
    changes: ChangeTracker
    sums: StepSums

    def find_server_obstacle(self) -> str | None:
        if self.recipe.framework != "torch":
            return f"recipes of the framework {self.recipe.framework} are not served; write it for torch"
        if self.updater.several:
            return "it has several optimizers; return one from optimizer()"
        if self.recipe_state.exists:
            return "each worker would remember something else in its state(); leave state() out"
        if changed := [b.name for b in self.changes.buffer_reducer.changed_buffers]:
            return (
                f"each worker's {changed[0]} would follow other examples, as the statistics of batch norm do; use "
                "GroupNorm, which has none"
            )
        return None

    def _parameters(self, parts: Parts = None) -> list[nn.Parameter]:
        params = self.updater.losses[0].get_parameters()
        return params if parts is None else [params[number] for number in parts]

    def parameter_bytes(self, parts: Parts = None) -> list[int]:
        return [-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in self._parameters(parts)]

    def make_array(self, parts: Parts = None) -> Bytes:
        sizes = self.parameter_bytes(parts)
        return np.zeros(sum(sizes) + len(sizes), np.uint8)

    def _view(self, data: Bytes, params: Sequence[nn.Parameter], parts: Parts) -> Iterator[Tensor]:
        """Yield the values of each parameter in an array."""
        flat, starts = torch.from_numpy(data), itertools.accumulate([0, *self.parameter_bytes(parts)])
        for p, start in zip(params, starts, strict=False):
            yield flat[start : start + p.numel() * p.element_size()].view(p.dtype).view(p.shape)

    @torch.no_grad()
    def read_weights(self, into: Bytes, parts: Parts = None) -> None:
        params = self._parameters(parts)
        for p, view in zip(params, self._view(into, params, parts), strict=True):
            view.copy_(p)

    @torch.no_grad()
    def write_weights(self, weights: Bytes, parts: Parts = None) -> None:
        params = self._parameters(parts)
        for p, view in zip(params, self._view(weights, params, parts), strict=True):
            p.copy_(view)
        self.changes.parameter_watch.set_baseline()

    def read_gradients(self, into: Bytes, parts: Parts = None) -> None:
        params = self._parameters(parts)
        flags = into[-len(params) :]
        for number, (p, view) in enumerate(zip(params, self._view(into, params, parts), strict=True)):
            if p.grad is not None and p.grad.is_sparse:
                raise UserError("--server with sparse gradients, of an embedding: set sparse=False")
            flags[number] = p.grad is not None
            if p.grad is not None:
                view.copy_(p.grad)

    def add_gradients(self, gradients: Bytes, factor: float, parts: Parts = None) -> None:
        params = self._parameters(parts)
        flags = gradients[-len(params) :]
        for has_gradient, p, view in zip(flags, params, self._view(gradients, params, parts), strict=True):
            if has_gradient:
                own = view.to(p.device, copy=True)
                own = own if factor == 1 else own.mul_(factor)
                p.grad = own if p.grad is None else p.grad.add_(own)

    @torch.no_grad()
    def compensate_delay(self, gradients: Bytes, read: Bytes, strength: float, parts: Parts = None) -> None:
        params = self._parameters(parts)
        views = (self._view(data, params, parts) for data in (gradients, read))
        for p, g, w in zip(params, *views, strict=True):
            g.addcmul_(g * g, p.to(g.device) - w, value=strength)

    def add_scores(self, sums: NDArray[np.float64], is_finite: bool) -> None:
        self.sums.vector[: len(sums)] += torch.from_numpy(sums).to(self.sums.vector.device)
        if not is_finite:
            self.sums.nonfinite_here.fill_(True)

    def take_optimizer_state(self, data: bytes, parts: Sequence[int]) -> None:
        params, optimizer = self._parameters(), self.updater.losses[0].optimizer
        saved = read_tensors(data, torch.device("cpu"))["optimizer"]["state"]
        for number in (number for number in parts if number in saved):
            p = params[number]
            optimizer.state[p] = {
                name: value.to(p.device) if isinstance(value, Tensor) and value.dim() else value
                for name, value in saved[number].items()
            }

    def keep_optimizer_state(self, parts: Sequence[int]) -> None:
        optimizer, kept = self.updater.losses[0].optimizer, set(parts)
        for number, p in enumerate(self._parameters()):
            if number not in kept:
                optimizer.state.pop(p, None)
