"""A state that can be read back: torch.load(weights_only=True) refuses what torch.save takes."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from hvdtrain.exchange.local_tensors import is_dtensor
from hvdtrain.system.errors import UserError

READABLE_TYPES = (bool, int, float, complex, str, bytes, type(None))
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)


def make_savable(optimizer: torch.optim.Optimizer) -> None:
    """Turn numpy's numbers in an optimizer's groups and defaults to Python's, which can be saved and read back.

    And set the hooks that torch's constructor sets: an optimizer around another may not have called it.
    """
    for call in ("step", "state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            vars(optimizer).setdefault(f"_optimizer_{call}_{when}_hooks", OrderedDict())
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings.update({name: to_python_numbers(value) for name, value in settings.items() if name != "params"})


def to_python_numbers(value: Any) -> Any:
    """Return a value with Python's numbers for numpy's."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return type(value)(map(to_python_numbers, value)) if type(value) in (list, tuple) else value


def check_readable(state: Any, what: str) -> None:
    """Raise UserError that names the first part of a state that could be saved, but not read back.

    Plain tensors and numbers can; all else is saved and read back here.

    Args:
        state: dicts, lists and tuples of tensors and others.
        what: the words for the state.
    """
    for path, value in iterate_leaves(state, ""):
        if type(value) in READABLE_TYPES or type(value) in TENSOR_TYPES or is_dtensor(value):  # which is saved whole
            continue
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError, RuntimeError, ValueError) as error:
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise UserError(
                f"{what}{path} is a {kind}, with which a checkpoint could not be read back: make it a tensor, a "
                "number, a text, or lists and dicts of them"
            ) from error


def iterate_leaves(state: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what nested dicts, lists and tuples hold, each with the keys that lead to it: "['a'][0]"."""
    if isinstance(state, Mapping) and type(state).__module__ in ("builtins", "collections"):
        for key, value in state.items():
            yield from iterate_leaves(key, f"{path}.keys()")
            yield from iterate_leaves(value, f"{path}[{key!r}]")
    elif type(state) in (list, tuple):
        for place, value in enumerate(state):
            yield from iterate_leaves(value, f"{path}[{place}]")
    else:
        yield path, state
