"""Collectives whose parts differ in size between ranks, over Horovod by their names, or over a `TorchGroup`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm.collectives import Group, Handle, find_process_set, find_torch_group, remember_name, wait
from hvdtrain.comm.lazy_horovod import LazyHorovod

if TYPE_CHECKING:
    import horovod.torch as hvd
else:
    hvd = LazyHorovod()


def all_to_all_parts_async(tensor: torch.Tensor, lengths: Sequence[int], name: str, group: Group = None) -> Handle:
    """Start sending parts of these lengths of a 1-D tensor, part i to rank i; `wait` returns those received in order.

    Args:
        tensor: (sum(lengths),), contiguous.
        lengths: of the parts, one a rank; any may be 0.
        name: of the collective.
        group: ranks of Horovod; None: all.
    """
    assert find_torch_group(group) is None, "which would have to know what it receives"
    splits = torch.tensor(lengths, dtype=torch.int32)
    return remember_name(
        hvd.alltoall_async(tensor, splits=splits, name=name, process_set=find_process_set(group)), name
    )


def reduce_scatter_async(tensor: torch.Tensor, name: str, group: Group = None) -> Handle:
    """Start summing a tensor over ranks of Horovod; `wait` returns this rank's rows, of the first ranks one more."""
    assert find_torch_group(group) is None, "none of those who scatter sums is in a grid"
    process_set = find_process_set(group)
    return remember_name(hvd.reducescatter_async(tensor, name=name, op=hvd.Sum, process_set=process_set), name)


def swap_bytes(
    data: bytes, sent: Sequence[int], received: Sequence[int], name: str, group: Group = None
) -> list[bytes]:
    """Return the bytes received from each rank of a group, all of which call this.

    Args:
        data: one after the other, what is for each rank.
        sent: how much of it is for each.
        received: how much comes from each.
        name: of the collective.
        group: the ranks; None: all.
    """
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    if (torch_group := find_torch_group(group)) is not None:
        found = torch_group.start_all_to_all_rows(own, sent, received).wait()
    else:
        found = wait(all_to_all_parts_async(own, sent, name, group))
    return [part.numpy().tobytes() for part in torch.split(found, list(received))]


def exchange_bytes(parts: Sequence[bytes], name: str, group: Group = None) -> list[bytes]:
    """Send each rank its bytes, in the order of ranks, and return those received from each; all ranks call this."""
    size, sent = collectives.size(group), [len(part) for part in parts]
    gathered = wait(collectives.all_gather_async(torch.tensor(sent), f"{name}.lengths", group)).view(size, size)
    received = gathered[:, collectives.rank(group)].tolist()
    return swap_bytes(b"".join(parts), sent, received, f"{name}.bytes", group)


def gather_on_root(data: bytes, name: str, group: Group = None) -> list[bytes]:
    """Return the bytes of every rank of a group, in their order, on its first; an empty list on the others."""
    size = collectives.size(group)
    if size == 1:
        return [data]
    lengths = wait(collectives.all_gather_async(torch.tensor([len(data)]), f"{name}.lengths", group)).tolist()
    is_root = collectives.rank(group) == 0
    received = lengths if is_root else [0] * size
    found = swap_bytes(data, [len(data)] + [0] * (size - 1), received, f"{name}.bytes", group)
    return found if is_root else []
