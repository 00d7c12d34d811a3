"""A process group of torch.distributed as the group of `hvdtrain.comm.collectives`, in place of Horovod.

torch.distributed does not match collectives by name: all ranks must start those of a process group in the same order.
A reducer's second round starts when the first has arrived, which is not the same moment on all ranks, so it goes over a
process group of its own (`TorchGroup.second`). torch's own PowerSGD hook starts its second round in the callback of the
first, on one of Gloo's threads, and so mixes up the collectives of two buckets (pytorch#58467).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from hvdtrain.system.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # that are supported, by the type of the tensors' device


@dataclass(frozen=True, eq=False)
class TorchCollective:
    """A collective that was started."""

    work: dist.Work
    sent: torch.Tensor  # kept until all of it is sent
    result: torch.Tensor
    divisor: int = 1

    def is_complete(self) -> bool:
        """Return whether `wait` would return at once."""
        return bool(self.work.is_completed())

    def wait(self) -> torch.Tensor:
        """Wait and return the result; over NCCL only the current stream waits."""
        self.work.wait()
        if self.divisor > 1:
            self.result.div_(self.divisor)
        return self.result


class TorchGroup:
    """The ranks of a process group.

    Attributes:
        second: the same ranks, for second rounds.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        """Connect all ranks of the process group a second time, if it is Gloo's: all of them call this.

        Args:
            process_group: of backend gloo for a CPU, nccl for a CUDA device.
            device: of the tensors.

        Raises:
            UserError: the process group has another backend for tensors on the device.
        """
        self.process_group: Any = process_group  # or a backend's, which has the same methods
        backend = find_backend(process_group, device)
        if backend != BACKENDS.get(device.type):
            raise UserError(
                f"the process group carries tensors on {device.type} by {backend or 'no backend'}; expected gloo for "
                "cpu or nccl for cuda: give init_process_group that backend"
            )
        # NCCL's collectives are started without waiting for those before: in the same order on all ranks.
        self.second = self
        if backend == "gloo" and self.size() > 1:
            self.second = TorchGroup.__new__(TorchGroup)
            self.second.process_group = self._connect_again()
            self.second.second = self.second

    def _connect_again(self) -> dist.ProcessGroupGloo:
        """Return a process group of the same ranks, in the same order.

        Not by `dist.new_group`: ranks that are not in this group would have to call it too, or to have made as many
        groups as those in it.
        """
        prefix = self.gather_texts(uuid.uuid4().hex)[0]
        store = PrefixStore(f"hvdtrain.{prefix}", _get_default_store())
        return dist.ProcessGroupGloo(store, self.rank(), self.size())

    def rank(self) -> int:
        """Return this process's rank in the group."""
        return self.process_group.rank()  # type: ignore[no-any-return]

    def size(self) -> int:
        """Return the number of ranks."""
        return self.process_group.size()  # type: ignore[no-any-return]

    def start_all_reduce(self, tensor: torch.Tensor, average: bool) -> TorchCollective:
        """Start an in-place sum, or mean, over ranks."""
        work = self.process_group.allreduce(tensor)
        return TorchCollective(work, tensor, tensor, self.size() if average else 1)

    def start_all_to_all(self, tensor: torch.Tensor) -> TorchCollective:
        """Start sending part i of a 1-D tensor, cut into equal parts, to rank i."""
        received = torch.empty_like(tensor)
        work = self.process_group.alltoall_base(received, tensor, [], [])
        return TorchCollective(work, tensor, received)

    def start_all_gather(self, tensor: torch.Tensor) -> TorchCollective:
        """Start gathering tensors of one shape, joined along the first dimension."""
        received = tensor.new_empty((self.size() * tensor.shape[0], *tensor.shape[1:]))
        work = self.process_group._allgather_base(received, tensor)
        return TorchCollective(work, tensor, received)

    def gather_texts(self, text: str) -> list[str]:
        """Return every rank's text, in the order of ranks, on every rank."""
        texts: list[str] = [""] * self.size()
        dist.all_gather_object(texts, text, group=self.process_group)
        return texts


def find_backend(process_group: dist.ProcessGroup, device: torch.device) -> str:
    """Return the name of what carries tensors on a device, in lower case: "gloo", "nccl"; "" if nothing does."""
    try:
        return process_group._get_backend(device).name().lower()
    except RuntimeError:  # there is none for such devices
        return ""
