"""What torch keeps of the process group by which ranks hold a model together: each world of an elastic run has another.

A DTensor finds the group by its name, and the default group of each world has the same one. What else refers to a group
must let go of it when its world ends: others that wait for this rank in it learn of the end only then.

Private attributes of torch, which are used here only:

    DeviceMesh._pg_registry             groups by their names, for torch.compile
    FSDPMeshInfo.shard_process_group    of each module that FSDP2 has wrapped
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from hvdtrain.comm.world import connections
from hvdtrain.exchange.local_tensors import is_dtensor
from hvdtrain.system.errors import UserError


class ReplicaGroups:
    """What DTensors on a mesh, and modules that FSDP2 has wrapped, keep of their process group.

    Attributes:
        mesh: of a replica's ranks.
        sharded: the modules, the root last; [] for --tensor.
    """

    def __init__(self, mesh: Any, sharded: Sequence[Any], flag: str) -> None:
        """Note what was divided. flag: the option that did it, for messages."""
        self.mesh, self.sharded, self._flag = mesh, sharded, flag

    def connect(self) -> None:
        """Use the default group of the world that was entered, until `close`, which the world's end calls."""
        if self.sharded and not hasattr(self.sharded[-1], "reset_iter_state"):
            raise UserError(f"{self._flag} in an elastic run needs torch 2.14 or later, which can drop a failed step")
        for info in self._list_mesh_infos():
            info.shard_process_group = dist.group.WORLD
        connections.add(self)

    def close(self) -> None:
        """Let go of the group, and of a step that has failed in the middle."""
        connections.discard(self)
        if self.sharded:
            root = self.sharded[-1]
            for p in root.parameters():
                if not is_dtensor(p):  # whole, in the middle of a pass
                    p.grad = None
            root.reset_iter_state()
        for info in self._list_mesh_infos():
            info.shard_process_group = None
        self.mesh._pg_registry.clear()

    def _list_mesh_infos(self) -> Iterator[Any]:
        for module in self.sharded:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield group.mesh_info
