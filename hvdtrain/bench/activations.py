"""What a forward pass keeps for the backward pass, in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hvdtrain.exchange.local_tensors import local_tensor


class KeptActivations:
    """Counts the memory of the tensors that autograd keeps, each once; that of parameters and buffers does not count.

    Attributes:
        block_bytes: of each block, what its own forward pass has kept, its input apart; in the order in which they ran.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        """Count nothing yet. blocks: whose part is to be known."""
        self._own = {address for p in (*model.parameters(), *model.buffers()) for address, _ in list_memory(p)}
        self._blocks = blocks
        self._kept: dict[int, int] = {}  # bytes by address
        self.block_bytes: list[int] = []

    @property
    def total_bytes(self) -> int:
        """Bytes kept so far."""
        return sum(self._kept.values())

    def add_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are kept as well, each once."""
        for x in tensors:
            self._pack(x)

    @contextlib.contextmanager
    def record_forward(self) -> Iterator[None]:
        """Count what is kept in a forward pass in the block; one backward pass may follow in it."""
        hooks: list[torch.utils.hooks.RemovableHandle] = []
        begins: list[int] = []
        for block in self._blocks:
            hooks.append(block.register_forward_pre_hook(lambda _, args: begins.append(self._begin_block(args))))
            hooks.append(block.register_forward_hook(lambda *_: self._end_block(begins)))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin_block(self, args: tuple[object, ...]) -> int:
        inputs = dict(piece for x in args if isinstance(x, Tensor) for piece in list_memory(x))
        return self.total_bytes + sum(size for address, size in inputs.items() if address not in self._kept)

    def _end_block(self, begins: list[int]) -> None:
        self.block_bytes.append(max(0, self.total_bytes - begins.pop()))

    def _pack(self, x: Tensor) -> Tensor:
        for address, size in list_memory(x):
            if address not in self._own:
                self._kept[address] = max(size, self._kept.get(address, 0))
        return x.detach()  # an output that is kept as it is would keep its own graph, and so itself


def list_memory(x: Tensor) -> list[tuple[int, int]]:
    """Return address and bytes of each piece of memory that a tensor lies in: all of a view's, several if sparse.

    Of a DTensor that is this rank's part.
    """
    x = local_tensor(x)
    if x.layout is torch.sparse_coo:
        return [piece for part in (x._indices(), x._values()) for piece in list_memory(part)]
    if x.layout is not torch.strided:
        return [(id(x), x.numel() * x.element_size())]
    storage = x.untyped_storage()
    return [(storage.data_ptr(), storage.nbytes())] if storage.nbytes() else []


def count_memory(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory that tensors lie in, shared memory once."""
    return sum(dict(piece for x in tensors for piece in list_memory(x)).values())
