"""Gradients of a model in stages, between the columns' sums and the update: what the ranks of a replica agree on.

Each column has summed its stages' gradients over the replicas. A parameter that two stages have, such as an embedding
that is the output layer too, has a part of its gradient in each: these are added here. The sums of a column are the
same bits on all replicas, and so are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvdtrain.comm.torch_group import reporting_lost_peers
from hvdtrain.torch.replica_norm import compute_replica_norm


@dataclass(frozen=True)
class SharedParameter:
    """A parameter that several ranks of a replica have.

    Attributes:
        parameter: here; None if this rank has none.
        group: of the ranks that have it.
        is_counted: whether it is this rank's in norms.
    """

    parameter: nn.Parameter | None
    group: Any
    is_counted: bool


class StageGradients:
    """What the ranks of a replica, torch's default process group, do together with gradients."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.set_shared([])

    def set_shared(self, shared: Sequence[SharedParameter]) -> None:
        """Take note of the parameters that several ranks of this world's replicas have."""
        self.shared = shared
        self._elsewhere = {one.parameter for one in shared if not one.is_counted}

    def agree(self, here: bool) -> bool:
        """Return whether something holds on all ranks of the replica."""
        flag = torch.tensor(int(here), device=self.device)
        with reporting_lost_peers(True):
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    @torch.no_grad()
    def sum_shared(self) -> None:
        """Add up the parts of the gradients of parameters that several stages have."""
        for one in self.shared:
            p = one.parameter
            if p is None:
                continue
            part = torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
            total = part.contiguous()
            with reporting_lost_peers(True):
                dist.all_reduce(total, group=one.group)
            if p.grad is None or p.grad.is_sparse:
                p.grad = total
            elif total is not p.grad:
                p.grad.copy_(total)

    def compute_norm(self, params: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of all stages, () float64. params: of this rank's."""
        own = [p.grad for p in params if p.grad is not None and p not in self._elsewhere]
        with reporting_lost_peers(True):
            return compute_replica_norm(own, [], self.device)


def connect_holders(
    shared: dict[str, list[int]], parameters: dict[str, nn.Parameter], place: int, ranks: int
) -> list[SharedParameter]:
    """Return the parameters that several ranks of a replica have; all of them call this.

    Args:
        shared: by name the stages that have a parameter.
        parameters: this rank's, by the same names.
        place: of this rank in its replica.
        ranks: of a replica.
    """
    found = []
    for name, stages in shared.items():
        holders = sorted({stage % ranks for stage in stages})
        if len(holders) > 1:
            with reporting_lost_peers(True):
                group = dist.new_group(holders)  # by their ranks in the default group, which is the replica
            found.append(SharedParameter(parameters.get(name), group, place == holders[0]))
    return found
