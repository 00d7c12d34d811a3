"""Per-example outputs in evaluations: what `outputs` returns, or `score` next to its scores; checked, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.system.errors import UserError

Outputs = dict[str, NDArray[Any]]  # (B, ...) by name


def split_returned(returned: Any) -> tuple[Any, Any]:
    """Return the scores, and the outputs or None, of what `score` has returned: scores, or a pair of both."""
    is_pair = isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(one, Mapping) for one in returned)
    return returned if is_pair else (returned, None)


def missing_outputs(recipe: DatasetRecipe) -> UserError:
    """Return the error for a recipe that summarises outputs and has none."""
    name = type(recipe).__name__
    return UserError(
        f"{name}.summarise has no outputs to summarise: write {name}.outputs(self, model, batch), or return a pair of "
        "dicts (scores, outputs) from score"
    )


def make_arrays(call: str, outputs: Any, count: int) -> Outputs:
    """Return outputs of `count` examples as arrays; bfloat16, which numpy lacks, as float32.

    Raises UserError unless they are tensors or arrays (count, ...) by name. call: what returned them, for messages.
    """
    if not isinstance(outputs, Mapping) or not outputs:
        raise UserError(f"{call} returned {type(outputs).__name__} as outputs; expected a dict of arrays (B, ...)")
    found = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).resolve_conj().resolve_neg().numpy()
        if not isinstance(value, np.ndarray) or value.dtype.hasobject or value.shape[:1] != (count,):
            what = f"shape {value.shape} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise UserError(f"{call}: {name!r} is {what} for {count} examples; expected an array (B, ...) of numbers")
        found[str(name)] = value
    return found
