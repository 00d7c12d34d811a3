"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.tensors import (
    build_deepcopy_memo,
    is_finite,
    is_writable_in_place,
    load_module_state,
    overwrite_tensor,
)


class AveragedModel(nn.Module):
    """torch's AveragedModel with a decay, with the same state, but that leaves constants what they are.

    That one writes every buffer in each update, also those that may not be written, and makes NaN of what is not
    finite. Here parameters that are floating, finite and dense are averaged; the rest is the model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        try:
            self.module = copy.deepcopy(model, build_deepcopy_memo(model))
        except Exception as error:  # of anything that a model holds
            raise UserError(f"--ema: the model cannot be copied ({type(error).__name__}: {error})") from error
        self.register_buffer("n_averaged", torch.tensor(0))
        self.n_averaged: Tensor
        self.decay = decay
        self._is_averaged = [_can_be_averaged(p) for p in model.parameters()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, steps: int = 1) -> None:
        """Move the average towards the model's parameters; the first time, make it equal to them.

        steps: since the last time; as often it moves.
        """
        pairs = zip(self.module.parameters(), model.parameters(), self._is_averaged, strict=True)
        chosen = [(own.detach(), p.detach()) for own, p, averaged in pairs if averaged]
        averaged, current = [own for own, _ in chosen], [p for _, p in chosen]
        self._move_averages(averaged, current, steps)

    def _move_averages(self, averaged: list[Tensor], current: list[Tensor], steps: int) -> None:
        if averaged and self.n_averaged == 0:
            torch._foreach_copy_(averaged, current)
        elif averaged:
            move = get_ema_multi_avg_fn(self.decay**steps)  # type: ignore[no-untyped-call]
            move(averaged, current, self.n_averaged)
        self.n_averaged += steps

    def gather_average(self) -> None:
        """Let every rank have the average whole, for an evaluation; all ranks call this."""

    def gather_host_state(self) -> None:
        """Let rank 0 have the average whole in host memory, for `state_dict`; all ranks call this."""

    def free_average(self) -> None:
        """Free the memory of what other ranks have, after an evaluation."""

    def load_average(self, state: StateDict) -> None:
        """Load what `state_dict` has returned."""
        load_module_state(self, state)

    @torch.no_grad()
    def copy_constants(self, model: nn.Module) -> None:
        """Make what is not averaged equal to the model's: buffers, and parameters that cannot be averaged."""
        parameters = zip(self.module.parameters(), model.parameters(), self._is_averaged, strict=True)
        pairs: list[tuple[Tensor, Tensor]] = [(own, p) for own, p, averaged in parameters if not averaged]
        pairs += zip(self.module.buffers(), model.buffers(), strict=True)
        for own, current in pairs:
            overwrite_tensor(self.module, own, current.detach())


def _can_be_averaged(p: Tensor) -> bool:
    if p.requires_grad:
        return True
    return is_writable_in_place(p) and (p.is_floating_point() or p.is_complex()) and is_finite(p)
