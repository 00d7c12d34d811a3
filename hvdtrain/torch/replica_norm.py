"""The norm of the gradients of a model that several ranks hold together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hvdtrain.torch.shards import sum_squares
from hvdtrain.torch.tensors import view_as_real


def compute_replica_norm(own: Sequence[Tensor], shared: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the norm of all gradients of a replica, () float64: not finite if any of them is.

    All ranks of the replica call this, which is torch's default process group.

    Args:
        own: plain tensors that no other rank of the replica has: of its stage, or of its parts of parameters.
        shared: plain tensors that all of its ranks have alike; they count once.
        device: that the process group carries tensors of.
    """
    counted = [*own, *shared] if dist.get_rank() == 0 else own
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in counted]
    total = sum_squares([view_as_real(gradient) for gradient in dense], torch.float64)
    summed = torch.tensor(total, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.sqrt()
