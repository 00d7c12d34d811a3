"""Named collectives whose parts differ in size between ranks, over Horovod."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm.collectives import Group, Handle, remember_name, wait
from hvdtrain.comm.lazy_horovod import LazyHorovod
from hvdtrain.comm.torch_group import TorchGroup

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
    assert not isinstance(group, TorchGroup)
    splits = torch.tensor(lengths, dtype=torch.int32)
    process_set = group or hvd.global_process_set
    return remember_name(hvd.alltoall_async(tensor, splits=splits, name=name, process_set=process_set), name)


def reduce_scatter_async(tensor: torch.Tensor, name: str, group: Group = None) -> Handle:
    """Start summing a tensor over ranks; `wait` returns this rank's rows, of the first ranks one more if uneven."""
    assert not isinstance(group, TorchGroup)
    process_set = group or hvd.global_process_set
    return remember_name(hvd.reducescatter_async(tensor, name=name, op=hvd.Sum, process_set=process_set), name)


def exchange_bytes(parts: Sequence[bytes], name: str) -> list[bytes]:
    """Send each rank its bytes, in the order of ranks, and return those received from each; all ranks call this."""
    size, lengths = collectives.size(), [len(part) for part in parts]
    gathered = wait(collectives.all_gather_async(torch.tensor(lengths), f"{name}.lengths")).view(size, size)
    joined = bytearray(b"".join(parts))
    own = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    received = wait(all_to_all_parts_async(own, lengths, f"{name}.bytes"))
    theirs = torch.split(received, gathered[:, collectives.rank()].tolist())
    return [part.numpy().tobytes() for part in theirs]


def gather_on_root(data: bytes, name: str) -> list[bytes]:
    """Return every rank's bytes, in the order of ranks, on rank 0; an empty list on the others."""
    size = collectives.size()
    if size == 1:
        return [data]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    lengths = wait(collectives.all_gather_async(torch.tensor([len(own)]), f"{name}.lengths")).tolist()
    received = wait(all_to_all_parts_async(own, [len(own)] + [0] * (size - 1), f"{name}.bytes"))
    if collectives.rank() != 0:
        return []
    return [part.numpy().tobytes() for part in torch.split(received, lengths)]
