"""A process group of torch.distributed as the group of `hvdtrain.comm.collectives`, in place of Horovod.

torch.distributed does not match collectives by name: all ranks must start those of a process group in the same order.
A reducer's second round starts when the first has arrived, which is not the same moment on all ranks, so it goes over a
process group of its own (`TorchGroup.second`). torch's own PowerSGD hook starts its second round in the callback of the
first, on one of Gloo's threads, and so mixes up the collectives of two buckets (pytorch#58467).
"""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from hvdtrain.comm.lazy_horovod import load_peers_lost
from hvdtrain.system.errors import UserError

NEVER = timedelta(days=30)  # until a collective is given up: a lost rank is noticed, and a hanging one ended
GLOO_MARK = "gloo/transport"  # in errors of its connections, which are RuntimeErrors
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # that are supported, by the type of the tensors' device


@dataclass(eq=False)
class TorchCollective:
    """A collective that was started."""

    work: Any  # of torch.distributed; None once the group was closed
    sent: torch.Tensor  # kept until all of it is sent
    result: torch.Tensor
    divisor: int = 1
    beside_horovod: bool = False  # as in `TorchGroup`

    def is_complete(self) -> bool:
        """Return whether `wait` would return at once."""
        return bool(self.work.is_completed())

    def wait(self) -> torch.Tensor:
        """Wait and return the result; over NCCL only the current stream waits."""
        with reporting_lost_peers(self.beside_horovod):
            if self.work is None:
                raise RuntimeError("the group was closed")
            self.work.wait()
        if self.divisor > 1:
            self.result.div_(self.divisor)
        return self.result


class TorchGroup:
    """The ranks of a process group.

    Attributes:
        second: the same ranks, for second rounds.
        device: of the tensors.
        beside_horovod: whether a lost rank is reported as Horovod does, by PeersLost.
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
        self.device, self.beside_horovod = device, False
        self._started = weakref.WeakSet[TorchCollective]()
        backend = find_backend(process_group, device)
        if backend != BACKENDS.get(device.type):
            raise UserError(
                f"the process group carries tensors on {device.type} by {backend or 'no backend'}; expected gloo for "
                "cpu or nccl for cuda: give init_process_group that backend"
            )
        # NCCL's collectives are started without waiting for those before: in the same order on all ranks.
        self.second = self
        if backend == "gloo" and self.size() > 1:
            self.second = self._connect_again()

    def _connect_again(self) -> TorchGroup:
        """Return a group of the same ranks, in the same order.

        Not by `dist.new_group`: ranks that are not in this group would have to call it too, or to have made as many
        groups as those in it.
        """
        prefix = self.gather_texts(uuid.uuid4().hex)[0]
        store = PrefixStore(f"hvdtrain.{prefix}", _get_default_store())
        return TorchGroup._of_backend(dist.ProcessGroupGloo(store, self.rank(), self.size()), self.device)

    @classmethod
    def _of_backend(cls, backend: Any, device: torch.device) -> TorchGroup:
        group = cls.__new__(cls)
        group.process_group, group.device, group.second, group.beside_horovod = backend, device, group, False
        group._started = weakref.WeakSet()
        return group

    @classmethod
    def of_default_group(cls, device: torch.device) -> TorchGroup:
        """Return torch's default process group, next to Horovod, without a second one; no rank is asked.

        device: of the tensors.
        """
        group = cls._of_backend(dist.group.WORLD, device)
        group.beside_horovod = True
        return group

    @classmethod
    def connect(cls, store: Store, rank: int, size: int, device: torch.device) -> TorchGroup:
        """Return a group of ranks that meet in a store, next to Horovod; all of them call this.

        Args:
            store: of these ranks alone, for instance a PrefixStore.
            rank: this process's in the group.
            size: the number of ranks.
            device: of the tensors: Gloo carries those of a CPU, NCCL those of a CUDA device.

        Raises:
            PeersLost: another rank does not come.
        """
        groups = list[TorchGroup]()
        for name in ("first", "second") if device.type == "cpu" and size > 1 else ("first",):
            own = PrefixStore(name, store)
            with reporting_lost_peers(True):
                if device.type == "cpu":
                    backend: Any = dist.ProcessGroupGloo(own, rank, size, NEVER)
                else:
                    options = dist.ProcessGroupNCCL.Options()
                    options._timeout = NEVER
                    backend = dist.ProcessGroupNCCL(own, rank, size, options)
            groups.append(cls._of_backend(backend, device))
            groups[-1].beside_horovod = True
        groups[0].second = groups[-1]
        return groups[0]

    def abort(self) -> None:
        """Let collectives in progress fail, here and on those that wait for this rank in them, and close."""
        for group in {self, self.second}:
            group.process_group.abort()
        self.close()

    def rank(self) -> int:
        """Return this process's rank in the group."""
        return self.process_group.rank()  # type: ignore[no-any-return]

    def size(self) -> int:
        """Return the number of ranks."""
        return self.process_group.size()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the connections: those who wait for this rank in them learn that it has left.

        torch closes them when nothing refers to the group any more, nor to a collective that was started.
        """
        for collective in self._started:
            collective.work = None
        self.process_group = None
        if self.second is not self:
            self.second.close()

    def _remember(self, collective: TorchCollective) -> TorchCollective:
        self._started.add(collective)
        return collective

    def start_all_reduce(self, tensor: torch.Tensor, average: bool) -> TorchCollective:
        """Start an in-place sum, or mean, over ranks."""
        with reporting_lost_peers(self.beside_horovod):
            work = self.process_group.allreduce(tensor)
        return self._remember(TorchCollective(work, tensor, tensor, self.size() if average else 1, self.beside_horovod))

    def start_all_to_all(self, tensor: torch.Tensor) -> TorchCollective:
        """Start sending part i of a 1-D tensor, cut into equal parts, to rank i."""
        received = torch.empty_like(tensor)
        with reporting_lost_peers(self.beside_horovod):
            work = self.process_group.alltoall_base(received, tensor, [], [])
        return self._remember(TorchCollective(work, tensor, received, beside_horovod=self.beside_horovod))

    def start_all_to_all_rows(
        self, tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> TorchCollective:
        """Start sending `sent[i]` rows of a contiguous tensor to rank i, in the order of ranks.

        received: how many rows come from each rank; the result has them in the order of ranks.
        """
        result = tensor.new_empty((sum(received), *tensor.shape[1:]))
        with reporting_lost_peers(self.beside_horovod):
            work = self.process_group.alltoall_base(result, tensor, list(received), list(sent))
        return self._remember(TorchCollective(work, tensor, result, beside_horovod=self.beside_horovod))

    def start_all_gather(self, tensor: torch.Tensor) -> TorchCollective:
        """Start gathering tensors of one shape, joined along the first dimension."""
        received = tensor.new_empty((self.size() * tensor.shape[0], *tensor.shape[1:]))
        with reporting_lost_peers(self.beside_horovod):
            work = self.process_group._allgather_base(received, tensor)
        return self._remember(TorchCollective(work, tensor, received, beside_horovod=self.beside_horovod))

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> TorchCollective:
        """Start overwriting a tensor with that of the group's rank `root`."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        with reporting_lost_peers(self.beside_horovod):
            work = self.process_group.broadcast([tensor], options)
        return self._remember(TorchCollective(work, tensor, tensor, beside_horovod=self.beside_horovod))

    def gather_uneven(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's tensor, in the order of ranks; their first dimensions may differ, and be 0."""
        lengths = self.start_all_gather(torch.tensor([len(tensor)], device=self.device)).wait().tolist()
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]), device=self.device)
        padded[: len(tensor)] = tensor
        if not len(padded):
            return [tensor] * self.size()
        parts = torch.split(self.start_all_gather(padded).wait().to(tensor.device), len(padded))
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def gather_texts(self, text: str) -> list[str]:
        """Return every rank's text, in the order of ranks, on every rank."""
        data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)[: len(text.encode())]
        return [part.numpy().tobytes().decode() for part in self.gather_uneven(data)]


def find_backend(process_group: dist.ProcessGroup, device: torch.device) -> str:
    """Return the name of what carries tensors on a device, in lower case: "gloo", "nccl"; "" if nothing does."""
    try:
        return process_group._get_backend(device).name().lower()
    except RuntimeError:  # there is none for such devices
        return ""


def is_lost_peer(error: BaseException | None) -> bool:
    """Return whether an error, or what has caused it, is that a connection to another rank is lost."""
    while error is not None:
        if isinstance(error, (load_peers_lost(), dist.DistError)) or GLOO_MARK in str(error):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def reporting_lost_peers(beside_horovod: bool) -> Iterator[None]:
    """Raise Horovod's PeersLost for torch's error of a connection, if the group is one beside Horovod."""
    try:
        yield
    except RuntimeError as error:
        if not beside_horovod:
            raise
        raise load_peers_lost()(str(error)) from error
