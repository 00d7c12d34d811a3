"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.tensors import build_deepcopy_memo, is_finite, is_writable_in_place, overwrite_tensor


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
        self._average_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._is_averaged = [_can_be_averaged(p) for p in model.parameters()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters; the first time, make it equal to them."""
        pairs = zip(self.module.parameters(), model.parameters(), self._is_averaged, strict=True)
        chosen = [(own.detach(), p.detach()) for own, p, averaged in pairs if averaged]
        averaged, current = [own for own, _ in chosen], [p for _, p in chosen]
        if self.n_averaged == 0:
            torch._foreach_copy_(averaged, current)
        else:
            self._average_fn(averaged, current, self.n_averaged)
        self.n_averaged += 1

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
