"""The exponential moving average of a model that ranks hold together: each has its part, whole nowhere but on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.exchange.local_tensors import cut_local, is_dtensor, local_tensor, wrap_local
from hvdtrain.torch.divided_model import DividedModel
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.hyperparameters import StateDict


class LocalAverage(AveragedModel):
    """An averaged model that is the model itself, whose values change places with the average in evaluations.

    From `gather_average` to `free_average` the model has the averaged values, and this has those that are trained.
    """

    def __init__(self, divided: DividedModel, decay: float) -> None:
        nn.Module.__init__(self)
        vars(self)["module"] = divided.model  # not as a part of this module
        self._divided, self.decay, self._is_swapped = divided, decay, False
        self.register_buffer("n_averaged", torch.tensor(0))
        named = [(name, p) for name, p in divided.model.named_parameters() if p.requires_grad]
        self._trained = dict(named)
        self._averages = {name: local_tensor(p.detach()).clone() for name, p in named}
        self._host_state: StateDict = {}  # of the whole average, on rank 0, until it is saved

    def _list_current(self) -> list[Tensor]:
        """Return what this rank has of the model's parameters, which leave no mark when they are written."""
        return [local_tensor(p.data) for p in self._trained.values()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, steps: int = 1) -> None:
        self._move_averages(list(self._averages.values()), self._list_current(), steps)

    @torch.no_grad()
    def _swap(self) -> None:
        for average, current in zip(self._averages.values(), self._list_current(), strict=True):
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)
        self._is_swapped = not self._is_swapped

    def gather_average(self) -> None:
        """Let the model have the averaged values."""
        if not self._is_swapped:
            self._swap()

    def free_average(self) -> None:
        """Let the model have the values that are trained."""
        if self._is_swapped:
            self._swap()

    def gather_host_state(self) -> None:
        """Let rank 0 have the average whole in host memory, for `state_dict`; all ranks call this."""
        parts = {name: wrap_local(average, self._trained[name]) for name, average in self._averages.items()}
        self._host_state = self._divided.gather_whole(parts)

    def state_dict(self, *args: Any, **kwargs: Any) -> StateDict:  # type: ignore[override]
        """Return what was gathered; what is not averaged as the model has it."""
        averages, self._host_state = self._host_state, {}
        own = {p: name for name, p in self._trained.items()}
        names = {name: own.get(p) for name, p in self._divided.model.state_dict(keep_vars=True).items()}
        whole = {name: averages.get(names[name] or "", value) for name, value in self._divided.whole_state.items()}
        return {"n_averaged": self.n_averaged, **{f"module.{name}": value for name, value in whole.items()}}

    @torch.no_grad()
    def load_average(self, state: StateDict) -> None:
        self.free_average()
        self.n_averaged.copy_(state["n_averaged"])
        for name, average in self._averages.items():
            whole, p = state[f"module.{name}"], self._trained[name]
            average.copy_(cut_local(whole, p) if is_dtensor(p) else whole)

    def copy_constants(self, model: nn.Module) -> None:
        """Do nothing: what is not averaged is the model's own."""
