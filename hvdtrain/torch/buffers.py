"""Buffers that training changes, such as batch norm's running statistics, kept the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hvdtrain.collectives import ops
from hvdtrain.errors import RunError, UserError


class BufferMean:
    """After each step, every rank's buffers become their mean over ranks, weighted by the ranks' shares of the batch.

    So the whole training state is the same on each rank: a checkpoint and an evaluation need no choice of rank, and a
    rank without examples does not pull the mean. Integer buffers (a count of batches) are rounded.
    """

    def __init__(self, buffers: list[torch.Tensor], size: int) -> None:
        self.buffers, self.size = buffers, size
        self.payload_bytes = 4 * sum(b.numel() for b in self.buffers)
        self._before: list[torch.Tensor] = []
        self._handle: ops.Handle | None = None

    def begin(self) -> None:
        """Remember the buffers as they are before a step."""
        self._before = [b.clone() for b in self.buffers]

    def restore(self) -> None:
        """Undo what the step did to them."""
        for b, before in zip(self.buffers, self._before, strict=True):
            b.copy_(before)

    def start(self, part: float) -> None:
        """Start averaging; `part` is this rank's share of the global batch, the shares add up to 1."""
        if self.buffers and self.size > 1:
            flat = torch.cat([b.reshape(-1).float() for b in self.buffers]) * part
            self._handle = ops.all_reduce_async_(flat, "step.buffers")

    def finish(self) -> None:
        """Wait, and put the means into the buffers."""
        if self._handle is None:
            return
        flat = ops.wait(self._handle)
        self._handle = None
        for b, mean in zip(self.buffers, torch.split(flat, [b.numel() for b in self.buffers]), strict=True):
            b.copy_((mean if b.is_floating_point() else mean.round()).view(b.shape))


def refuse_rebound(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError if a buffer is not the tensor any more that it was: nothing that is held would be the model's.

    Those that are not part of the state are caches, and free.
    """
    now, persistent = dict(model.named_buffers()), model.state_dict().keys()
    for name, b in before.items():
        if now.get(name) is not b and name in persistent:
            owner, _, own = name.rpartition(".")
            layer = type(model.get_submodule(owner)).__name__
            raise UserError(
                f"training puts another tensor in the place of the buffer {name!r} of a {layer}, so that it cannot be "
                f"kept the same on all ranks: change it in place, self.{own}.copy_(...)"
            )


def refuse_changing(model: torch.nn.Module, changing: list[torch.Tensor]) -> None:
    """Raise UserError if training changes a buffer: its value would depend on which rank saw which examples."""
    for name, b in model.named_buffers():
        if any(b is other for other in changing):
            layer = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"--deterministic: training changes the buffer {name!r} of a {layer}, which depends on the number of "
                "ranks; use a layer without such buffers, GroupNorm for instance"
            )


def refuse_nonfinite(model: torch.nn.Module, changing: list[torch.Tensor]) -> None:
    """Raise RunError if a parameter, or a buffer that training changes, is not finite."""
    buffers = [(name, b) for name, b in model.named_buffers() if any(b is other for other in changing)]
    for name, tensor in [*model.named_parameters(), *buffers]:
        if not torch.isfinite(tensor).all():
            raise RunError(f"{name} is not finite; no checkpoint was written")
