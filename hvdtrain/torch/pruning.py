"""Which weights are pruned: those of smallest magnitude of all (Zhu and Gupta, 2017, arXiv:1710.01878).

Replicas have the same weights, to the bit, so that each rank chooses the same ones and nothing is sent:

    after a step   the round(s N) weights of smallest magnitude, pruned ones and the first of equal ones first
    update         the optimizer moves them (momentum, weight decay); they are set to zero again
    exchange       their gradients are zero, and travel in no bucket (`Bucket.leave_out`)

A pruned weight stays pruned. Weights are parameters of two dimensions or more that are trained, embeddings included;
biases and the scales of norms are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hvdtrain.system.errors import UserError
from hvdtrain.torch.recipe import Recipe


class Pruner:
    """Chooses weights of a model, and keeps them zero.

    Attributes:
        masks: by weight, bool and shaped like it: True for what is pruned.
    """

    def __init__(self, recipe: str, model: nn.Module, trained: Collection[nn.Parameter]) -> None:
        """Prune nothing yet.

        Args:
            recipe: its name.
            model: whose weights they are. One that shares memory with another framework has a method `own_memory`,
                after which its parameters may be written (`hvdtrain.bridge.shadow`).
            trained: the optimizers' parameters.

        Raises:
            UserError: none of them is a weight, or a layer computes its weight from others.
        """
        if (layer := find_computed_weight(model)) is not None:
            raise UserError(
                f"--prune: {layer!r} of {recipe}'s model computes its weight from other parameters (weight_norm, a "
                "parametrization), whose zeros are not the weight's: train it without"
            )
        self._own_memory: Callable[[], object] | None = getattr(model, "own_memory", None)
        self._names = {p: name for name, p in model.named_parameters() if p in trained and is_prunable(p)}
        if not self._names:
            raise UserError(
                f"--prune: no parameter of {recipe}'s model can be pruned; expected trained ones of two dimensions or "
                "more"
            )
        self.masks = {p: torch.zeros_like(p, dtype=torch.bool, requires_grad=False) for p in self._names}
        self._num_weights = sum(p.numel() for p in self.masks)
        self.num_pruned = 0

    @property
    def sparsity(self) -> float:
        """The share of the weights that are pruned."""
        return self.num_pruned / self._num_weights

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> bool:
        """Let round(sparsity * weights) be pruned, if those are more than there are; return whether they are."""
        count = round(sparsity * self._num_weights)
        if count <= self.num_pruned:
            return False
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in self.masks))
        magnitudes = torch.cat(
            [p.detach().abs().masked_fill_(mask, -1).flatten().to(dtype) for p, mask in self.masks.items()]
        )
        threshold = torch.topk(magnitudes, count, largest=False, sorted=False).values.max()
        chosen = magnitudes < threshold
        equal = (magnitudes == threshold).nonzero().squeeze(1)
        chosen[equal[: count - int(chosen.sum())]] = True
        parts = torch.split(chosen, [p.numel() for p in self.masks])
        for mask, part in zip(self.masks.values(), parts, strict=True):
            mask.copy_(part.view(mask.shape))
        self.num_pruned = count
        self.zero_weights()
        return True

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Set pruned weights to zero."""
        if self.num_pruned == 0:
            return
        if self._own_memory is not None:
            self._own_memory()
        for p, mask in self.masks.items():
            p.masked_fill_(mask, 0)

    @torch.no_grad()
    def zero_copies(self, model: nn.Module, copied: nn.Module) -> None:
        """Set the weights of a copy of the model to zero that are pruned in the model."""
        for p, own in zip(copied.parameters(), model.parameters(), strict=True):
            if own in self.masks:
                p.masked_fill_(self.masks[own], 0)

    @torch.no_grad()
    def zero_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Set the gradients of pruned weights to zero."""
        if self.num_pruned == 0:
            return
        for p in params:
            if p.grad is None or p not in self.masks:
                continue
            if p.grad.is_sparse:  # whole rows
                p.grad = p.grad.coalesce()
                p.grad.values().masked_fill_(self.masks[p][p.grad.indices()[0]], 0)
            else:
                p.grad.masked_fill_(self.masks[p], 0)

    def get_state(self) -> dict[str, Tensor]:
        """Return the masks by name, 8 weights in a byte."""
        return {
            self._names[p]: torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))
            for p, mask in self.masks.items()
        }

    def load_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Take over masks; None: of a run that did not prune. Raises UserError for those of another model."""
        if state is not None and state.keys() != set(self._names.values()):
            odd = next(iter(state.keys() ^ set(self._names.values())))
            raise UserError(f"the checkpoint and this run prune different parameters, such as {odd!r}")
        for p, mask in self.masks.items():
            if state is None:
                mask.fill_(False)
                continue
            bits = np.unpackbits(state[self._names[p]].cpu().numpy(), count=p.numel())
            mask.copy_(torch.from_numpy(bits.astype(bool)).view(mask.shape))
        self.num_pruned = sum(int(mask.sum()) for mask in self.masks.values())


def make_pruner(recipe: Recipe, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Pruner:
    """Return what prunes the weights of a recipe's model that its optimizers have. Raises UserError: see `Pruner`."""
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return Pruner(type(recipe).__name__, model, held)


def find_computed_weight(model: nn.Module) -> str | None:
    """Return the name of a layer that computes a parameter from others before each forward; None without one."""
    for name, module in model.named_modules():
        hooks = getattr(module, "_forward_pre_hooks", {}).values()
        if is_parametrized(module) or any(isinstance(hook, (WeightNorm, SpectralNorm)) for hook in hooks):
            return str(name)
    return None


def is_prunable(p: nn.Parameter) -> bool:
    """Return whether a parameter holds weights: trained, of two dimensions or more, with real numbers."""
    return p.requires_grad and p.dim() >= 2 and p.is_floating_point()
