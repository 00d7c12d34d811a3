"""An optimizer whose groups hold, while it steps, what this rank has of their parameters.

Its hyperparameters and the groups stay where they are; the state that it makes is of the pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.optimizer_methods import WrappedOptimizer, read_param_groups


class PieceOwner:
    """This rank's part of an optimizer.

    Attributes:
        optimizer: whose groups hold pieces within `use_pieces`.
        pieces: of each parameter; empty if it is another rank's. A parameter that is not in it stays in its group.
        replaced: the groups' parameters, while they hold pieces.
        whole_state: of each parameter, on rank 0, once it was gathered and until it is saved.
        has_gradients: whether any rank has used a parameter in the last step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = cast(WrappedOptimizer, optimizer)
        self.pieces: dict[nn.Parameter, list[nn.Parameter]] = {}
        self.replaced: list[list[nn.Parameter]] | None = None
        self.whole_state: dict[nn.Parameter, StateDict] = {}
        self.has_gradients = False

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each of the optimizer's groups."""
        return self.replaced or [group["params"] for group in read_param_groups(self.optimizer)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all groups."""
        return [p for group in self.groups for p in group]

    @property
    def held_values(self) -> set[nn.Parameter]:
        """The pieces, of which the optimizer has a state."""
        return {piece for pieces in self.pieces.values() for piece in pieces}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    def take_gradients(self) -> None:
        """Give the pieces their gradients, which are reduced."""
        raise NotImplementedError

    def total_norm(self) -> Tensor:
        """Return the norm of the gradients of the whole model, (): not finite if any of them is.

        All ranks that have parts of it call this.
        """
        raise NotImplementedError

    def find_nonfinite(self) -> set[nn.Parameter]:
        """Return the parameters whose gradients are not finite on some rank; all ranks call this."""
        raise NotImplementedError

    def agree_on_overflow(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Let a loss scale skip the step if a gradient is not finite on any rank; return the norm of all together.

        All ranks call this once the gradients are unscaled.
        """
        norm = self.total_norm()
        share_overflow(scaler, self.optimizer, norm.to(self.device))
        return norm


def share_overflow(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Let a loss scale skip the step if the norm of all ranks' gradients, (), is not finite; on its device."""
    # A rank without a part of what is used has looked at nothing.
    found: Any = scaler._found_inf_per_device(optimizer)
    found[norm.device] = torch.full((), float(not torch.isfinite(norm)), device=norm.device)


@contextlib.contextmanager
def use_pieces(owner: PieceOwner | None) -> Iterator[None]:
    """Let an optimizer's groups hold pieces in place of parameters. None: leave them as they are."""
    if owner is None:
        yield
        return
    groups, replaced = read_param_groups(owner.optimizer), owner.groups
    for group in groups:
        group["params"] = [own for p in group["params"] for own in owner.pieces.get(p, [p])]
    owner.replaced = replaced
    try:
        yield
    finally:
        owner.replaced = None
        for group, params in zip(groups, replaced, strict=True):
            group["params"] = params
