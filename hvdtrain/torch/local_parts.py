"""An optimizer of a model that the ranks of a replica hold together: it steps what this rank has of each parameter.

    parameters          [ w (DTensor) ......... | b, whole on each rank ]
    pieces, rank 0      [ w's part ]              b itself
            rank 1              [ w's part ]      b itself

Pieces are plain tensors that share the parameters' memory. Its update of a piece must not depend on the rest of the
parameter, which is tried before the first step (hvdtrain.torch.shard_trial).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.exchange.local_tensors import (
    cut_local,
    is_dtensor,
    is_split_dtensor,
    local_gradient,
    local_tensor,
    wrap_local,
)
from hvdtrain.system.errors import UserError
from hvdtrain.torch.divided_model import DividedModel
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.piece_owner import PieceOwner, use_pieces
from hvdtrain.torch.replica_norm import compute_replica_norm
from hvdtrain.torch.shard_trial import find_shard_unit
from hvdtrain.torch.tensors import all_finite, view_as_real
from hvdtrain.torch.update_settings import UpdateSettings


class LocalParts(PieceOwner):
    """What this rank has of the parameters of an optimizer, in a replica that is torch's default process group."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], name: str) -> None:
        """Take this rank's part of an optimizer, wrapped or not.

        Args:
            optimizer: of DTensors and plain parameters.
            names: of all parameters.
            name: of its collectives.
        """
        super().__init__(optimizer)
        self.names, self.name = names, name
        self._adopt_parameters()

    def _adopt_parameters(self) -> None:
        """Make pieces of the parameters that have none, and of a state that the optimizer has of them."""
        state = self.optimizer.state
        for p in (p for p in self.parameters if is_dtensor(p) and p not in self.pieces):
            piece = nn.Parameter(local_tensor(p.detach()), requires_grad=p.requires_grad)
            self.pieces[p] = [piece]
            if p in state:
                kept = state.pop(p)
                state[piece] = {k: local_tensor(v) if isinstance(v, Tensor) else v for k, v in kept.items()}

    def check_optimizer(self, recipe_name: str, model: nn.Module, flag: str) -> None:
        """Raise UserError, on all ranks, if the optimizer's update of a part depends on the rest of the parameter.

        flag: the option that divides the model.
        """
        with use_pieces(self):
            found = find_shard_unit(self.optimizer, recipe_name, model, flag)
        whose = f"{recipe_name}.optimizer: {type(self.optimizer).__name__}"
        if found.unit != "elements":
            raise UserError(
                f"{whose} updates a parameter as a whole, of which a rank has a part with {flag}: use an optimizer "
                f"that treats each value alone, such as SGD or AdamW, or leave out {flag}"
            )
        if vars(self.optimizer).get("_optimizer_step_post_hooks"):
            raise UserError(f"{whose} has a hook after its step, which would see parts of parameters; leave out {flag}")

    # A step.

    def take_gradients(self) -> None:
        """Give the pieces their gradients; what each rank has whole gets the same bits on all ranks of the replica."""
        self._adopt_parameters()
        params = self.parameters
        for p in params:
            for piece in self.pieces.get(p, ()):
                piece.grad = None if p.grad is None else local_gradient(p)
        self.has_gradients = any(p.grad is not None for p in params)
        self._equalize([g for g in self._list_gradients(params, split=False) if not g.is_sparse])

    def _equalize(self, gradients: list[Tensor]) -> None:
        """Let all ranks of the replica have the bits of its first one, which kernels and sums may round otherwise."""
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
            same = [view_as_real(gradient) for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.reshape(-1) for gradient in same])
            dist.broadcast(flat, 0)
            parts = torch.split(flat, [gradient.numel() for gradient in same])
            for gradient, part in zip(same, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def _list_gradients(self, params: list[nn.Parameter], *, split: bool) -> list[Tensor]:
        """Return this rank's gradients of parameters of which it has a part, or which it has whole."""
        own = [self.pieces.get(p, [p])[0].grad for p in params if is_split_dtensor(p) == split]
        return [gradient for gradient in own if gradient is not None]

    def drop_gradients(self) -> None:
        """Free the memory of the pieces' gradients."""
        for piece in self.held_values:
            piece.grad = None

    def total_norm(self) -> Tensor:
        """Return the norm of the gradients of the whole model, (): not finite if any of them is.

        All ranks of the replica call this.
        """
        params = self.parameters
        own, shared = (self._list_gradients(params, split=split) for split in (True, False))
        norm = compute_replica_norm(own, shared, self.device)
        exact = any(gradient.dtype in (torch.float64, torch.complex128) for gradient in (*own, *shared))
        return norm if exact else norm.float()

    def find_nonfinite(self) -> set[nn.Parameter]:
        """Return the parameters whose gradients are not finite on some rank; all ranks call this."""
        params = self.parameters
        own = {p: self.pieces.get(p, [p])[0].grad for p in params}
        odd = [self.names[p] for p, gradient in own.items() if gradient is not None and not all_finite([gradient])]
        found = {name for names in collectives.gather_json(odd, f"{self.name}nonfinite") for name in names}
        return {p for p in params if self.names[p] in found}

    # The state.

    def gather_whole_state(self, divided: DividedModel) -> None:
        """Let rank 0 have, until it saves it, the state of whole parameters in host memory; all ranks call this."""
        self.whole_state = {}
        for p, (piece,) in self.pieces.items():
            state = self.optimizer.state.get(piece, {})
            whole = divided.gather_whole({k: wrap_local(v, p) if is_like(v, piece) else v for k, v in state.items()})
            if whole:
                self.whole_state[p] = whole

    def cut_state_dict(self, whole: StateDict) -> StateDict:
        """Return this rank's part of an optimizer's state dict. whole: that of the same groups of whole parameters."""
        params = self.parameters
        numbers = [number for group in whole["param_groups"] for number in group["params"]]
        state = dict(whole["state"])
        for number, p in zip(numbers, params, strict=True):
            if number in state and p in self.pieces:
                kept = state[number]
                state[number] = {key: cut_local(v, p) if is_like(v, p) else v for key, v in kept.items()}
        return {**whole, "state": state}


def is_like(value: Any, p: Tensor) -> bool:
    """Return whether a part of an optimizer's state has a value for each of a parameter's."""
    return isinstance(value, Tensor) and value.shape == p.shape and value.dim() > 0


def make_local_parts(optimizer: torch.optim.Optimizer, settings: UpdateSettings) -> LocalParts | None:
    """Return what this rank has of an optimizer that is not wrapped; None if ranks do not divide the model.

    All ranks call this. Raises UserError on all of them if the optimizer's update of a part depends on the rest.
    """
    if not any(map(is_dtensor, settings.model.parameters())):
        return None
    names = {p: name for name, p in settings.model.named_parameters()}
    parts = LocalParts(optimizer, names, "model.")
    parts.check_optimizer(settings.recipe_name, settings.model, settings.options.model_flag)
    return parts
