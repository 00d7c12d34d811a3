"""What a rank has of a parameter: torch's DTensor holds a part of it, any other tensor is whole.

Does not import torch.distributed.tensor: who has a DTensor has imported it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, of which each rank of its mesh has a part or a copy."""
    return hasattr(tensor, "_local_tensor")


def is_split_dtensor(tensor: Tensor) -> bool:
    """Return whether this rank has a part of a tensor only."""
    distributed: Any = tensor
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in distributed.placements)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, without a copy; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def local_gradient(p: torch.nn.Parameter) -> Tensor:
    """Return the gradient of this rank's part of a parameter that has one.

    Of a copy that each rank has used for its part of the work (sequence parallelism) the gradient is summed first.
    """
    gradient, distributed = cast(Any, p.grad), cast(Any, p)
    if is_dtensor(gradient) and gradient.placements != distributed.placements:
        gradient = gradient.redistribute(placements=distributed.placements)
    return local_tensor(gradient)


def wrap_local(local: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that this rank has `local` of, and the other ranks of the mesh the rest, as of a parameter."""
    if not is_dtensor(like):
        return local
    distributed: Any = like
    return type(distributed).from_local(  # type: ignore[no-any-return]
        local,
        distributed.device_mesh,
        distributed.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def cut_local(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that has a DTensor's shape, on that one's device; no rank is asked.

    What is this part already is returned as it is.
    """
    from torch.distributed.tensor import distribute_tensor

    distributed: Any = like
    moved = whole.to(local_tensor(like).device)
    if moved.shape == local_tensor(like).shape:
        return moved
    cut = distribute_tensor(moved, distributed.device_mesh, distributed.placements, src_data_rank=None)
    return local_tensor(cut)


def gather_whole(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, which all ranks of its mesh call; any other tensor as it is."""
    distributed: Any = tensor
    return distributed.full_tensor() if is_dtensor(tensor) else tensor
