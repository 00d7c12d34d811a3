"""Gradients of another framework in torch's backward pass: handed over once they are computed, without a copy.

    forward     the losses, of a score that is computed already
    backward    pullback(cotangents)  ->  a gradient of each parameter  ->  autograd's hooks fill the buckets

torch never writes into a gradient that the other framework has allocated: a second one of a step is added to it in new
memory, and if no exchange copies gradients into its buckets, they are copied here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.bridge.functions import Pullback
from hvdtrain.bridge.shadow import Shadow


@dataclass(frozen=True)
class ScoredPass:
    """A pass of `score` whose gradients may be asked for.

    Attributes:
        shadow: the model.
        pullback: of cotangents (rows,) of the losses, by their names.
        losses: by name, the numerators (rows,), of padded examples too.
        trained: by the losses' names, the names of the parameters whose gradients are of that loss.
        count: how many of the rows are examples of the batch; the first ones.
        copies_gradients: whether torch may write into a gradient later.
    """

    shadow: Shadow
    pullback: Pullback
    losses: Mapping[str, Tensor]
    trained: Mapping[str, Collection[str]]
    count: int
    copies_gradients: bool

    def attach_gradients(self) -> dict[str, Tensor]:
        """Return the losses (count,) by name, whose backward pass gives each parameter its gradient."""
        params = self.shadow.param_by_name.values()
        values = PullBack.apply(self, *params)
        return dict(zip(self.losses, values, strict=True))


class PullBack(torch.autograd.Function):
    """The losses of a pass as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, scored: ScoredPass, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.scored = scored
        ctx.set_materialize_grads(False)
        # Clones: autograd must own what it returns, and these are (B,) only.
        return tuple(values[: scored.count].clone() for values in scored.losses.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        scored: ScoredPass = ctx.scored
        padded, wanted = {}, set[str]()
        for (name, values), cotangent in zip(scored.losses.items(), cotangents, strict=True):
            padded[name] = torch.zeros_like(values)
            if cotangent is not None:
                padded[name][: scored.count] = cotangent
                wanted.update(scored.trained[name])
        gradients = scored.pullback(padded)
        shadow, export = scored.shadow, scored.shadow.backend.export_array
        found: list[Tensor | None] = [None]  # of `scored`
        for name, p in shadow.param_by_name.items():
            if name not in wanted:  # its own gradient, of another loss, stays as it is
                found.append(None)
                continue
            gradient = export(gradients.pop(name))
            if p.grad is not None:
                gradient, p.grad = p.grad + gradient, None
            elif scored.copies_gradients:
                gradient = gradient.clone()
            found.append(gradient)
        return tuple(found)
