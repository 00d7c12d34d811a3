"""The model as a graph for TensorBoard."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from hvdtrain.system.other_frameworks import tensorboard_without_tensorflow
from hvdtrain.torch.outputs import split_returned
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.scores import get_numerators


def trace_losses(recipe: Recipe, model: torch.nn.Module, batch: Any, losses: Sequence[str], draw: bool) -> bytes | None:
    """Trace the losses of a batch into a serialized GraphDef; None for a batch that is not a sequence of tensors.

    All ranks call it, for `score` may exchange something with the others. Puts the model into evaluation mode. Raises
    whatever the recipe's code raises when it is traced.

    Args:
        recipe: that scores.
        model: scored with.
        batch: to score.
        losses: the names of the scores that are minimized; their sum is traced.
        draw: return the graph; otherwise None.
    """
    if not isinstance(batch, (list, tuple)) or not all(isinstance(part, torch.Tensor) for part in batch):
        return None

    class LossModule(torch.nn.Module):
        """Tracing needs a module from tensors to a tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            given = type(batch)(*tensors) if hasattr(batch, "_fields") else type(batch)(tensors)
            scores, _ = split_returned(recipe.score(self.model, given))
            values = [get_numerators(scores[name]) for name in losses]
            return values[0] if len(values) == 1 else torch.stack([value.sum() for value in values]).sum()

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # tracing warns of every branch in Python
        # Traced here, for the check that tracing does by default would import torch's compiler.
        traced = torch.jit.trace(LossModule().eval(), tuple(batch), check_trace=False)  # type: ignore[no-untyped-call]
        if not draw:
            return None
        try:
            with tensorboard_without_tensorflow():
                from torch.utils.tensorboard._pytorch_graph import graph
        except ModuleNotFoundError:
            return None  # no TensorBoard, as rank 0's report has said

        return graph(traced, tuple(batch))[0].SerializeToString()  # type: ignore[no-any-return, no-untyped-call]
