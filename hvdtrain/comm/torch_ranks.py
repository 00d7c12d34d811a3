"""Connect ranks of Horovod's world by torch.distributed as well, next to Horovod.

    open_store       rank 0 serves a signed store, all ranks know it          15 to 25 ms
    connect_ranks    some ranks of the world as a `TorchGroup`, by the store   10 to 20 ms

Horovod's collectives are matched by name and take 1 ms at least; torch's are matched by their order, take a third of
that when they are small, and can be among some of the ranks only without slowing down the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.distributed_c10d import PrefixStore

from hvdtrain.comm.signed_store import SignedStore
from hvdtrain.comm.signed_store import open_store as open_store
from hvdtrain.comm.torch_group import TorchGroup
from hvdtrain.comm.world import World


def connect_ranks(
    store: SignedStore, name: str, members: Sequence[int], world: World, device: torch.device
) -> TorchGroup | None:
    """Return the group of some ranks of the world, all of which call this; None on a rank that is not one of them.

    Args:
        store: of the world.
        name: of the group, different from those of other groups of the same ranks.
        members: the ranks, in the order of the group.
        world: this process's place.
        device: of the tensors.

    Raises:
        PeersLost: a member does not come.
    """
    if world.rank not in members:
        return None
    own = PrefixStore(f"{name}.{'-'.join(map(str, members))}", store)
    return TorchGroup.connect(own, members.index(world.rank), len(members), device)
