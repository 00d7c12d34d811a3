"""What takes back an optimizer's update: its parameters, their state and the groups, as they were before."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.optimizer_methods import read_param_groups


class UpdateUndo:
    """A copy of what an update changes, made before it.

    Attributes:
        states: of each parameter, as the optimizer had it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Collection[nn.Parameter]) -> None:
        """Copy what a step of the optimizer may change of these parameters."""
        self._groups = [
            (group, {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")})
            for group in read_param_groups(optimizer)
        ]
        self._values = {p: p.detach().clone() for p in params}
        self.states: dict[nn.Parameter, StateDict] = {p: copy_state(optimizer.state.get(p, {})) for p in params}

    def restore(self) -> None:
        """Let parameters and groups be as they were; the states are the caller's."""
        for p, value in self._values.items():
            p.detach().copy_(value)
        for group, before in self._groups:
            group.update(before)


def copy_state(state: Any) -> StateDict:
    """Return what an optimizer keeps of a parameter, with copies of its tensors."""
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
