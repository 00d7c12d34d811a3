"""Keeps the buffers that training changes, such as batch norm's running statistics, the same on all ranks.

What becomes of a buffer after a step, by its mode; `before` is its value before the step, the same on all ranks:

    mean    sum over ranks of (share of the batch) * value        integers: before + round(mean of the changes)
    sum     before + sum over ranks of (value - before)           counters and histograms, exact for integers
    rank0   rank 0's value
    local   every rank keeps its own; rank 0's is in checkpoints
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.exchange.tensors import differing, fingerprints, is_due, is_plain, mark
from hvdtrain.system.errors import UserError
from hvdtrain.torch.buffers import Buffer, Mode, known_mode, rebound, value_before

OTHERS = '  # or "mean", "sum", "local"'


@dataclass
class Travelling:
    """Buffers on their way over the ranks, joined by how they are combined."""

    floats: list[Buffer] = field(default_factory=list)  # float64: means, sums of floats, small counts of rank 0
    integers: list[Buffer] = field(default_factory=list)  # int64: sums of integers
    raw: list[Buffer] = field(default_factory=list)  # bytes of rank 0
    flats: list[Tensor] = field(default_factory=list)
    handles: list[collectives.Handle] = field(default_factory=list)


class BufferReducer:
    """Watches a model's buffers, and combines those that change after each step as their modes say.

    `start_step`, then the forward passes, `changes` and `start`, then (with the changes summed over ranks) `finish`.
    A buffer begins to travel in the step after the first in which a rank changed it; in that one it follows at the end.
    """

    def __init__(self, recipe: str, model: nn.Module, modes: Mapping[str, Mode], size: int, fixed: bool) -> None:
        """modes: those that the recipe declares, by name. fixed: no buffer may change (--deterministic)."""
        self.recipe, self.model, self.modes, self.size, self.fixed = recipe, model, modes, size, fixed
        self._warnings: list[str] = []  # lines for the user, until they are taken
        self._warned: set[str] = set()
        self._buffers = [self._track(name, b) for name, b in model.named_buffers()]
        self._modules = [(module._buffers, len(module._buffers)) for module in model.modules()]
        self._travelling: Travelling | None = None
        self._share = 1.0
        self._steps = 0
        self._contents = fingerprints(self._constants())

    def _track(self, name: str, b: Tensor) -> Buffer:
        owner_name, _, key = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        mode = self.modes.get(name) or known_mode(owner, key)
        return Buffer(name, owner, b, mode, name in self.modes, mark(b))

    @property
    def places(self) -> int:
        """How many numbers `changes` returns."""
        return len(self._buffers) + 1

    @property
    def changing(self) -> list[Buffer]:
        """The buffers that have changed so far."""
        return [b for b in self._buffers if b.travels]

    @property
    def payload_bytes(self) -> int:
        """Bytes that a step joins to its exchange."""
        travelling = _sort([b for b in self._buffers if b.travels])
        values = [b.tensor.numel() * (2 if b.tensor.is_complex() else 1) for b in travelling.floats]
        counts = [b.tensor.numel() for b in travelling.integers]
        return 8 * sum(values) + 8 * sum(counts) + sum(b.tensor.nbytes for b in travelling.raw)

    @property
    def local(self) -> set[str]:
        """The names of the buffers that each rank keeps for itself."""
        return {b.name for b in self._buffers if b.mode == "local"}

    def take_warnings(self) -> list[str]:
        """Return the lines for the user since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def expect_changes(self, names: Sequence[str]) -> None:
        """Take note that training changes these buffers. Raises UserError on several ranks if nothing is known of one.

        All ranks call it with the same names.
        """
        found = [b for b in self._buffers if b.name in names]
        self._refuse(found)
        for b in found:
            b.travels = True

    def start_world(self, size: int) -> None:
        """Continue with another number of ranks, which have the same buffers."""
        self.size, self._travelling, self._steps = size, None, 0
        self._refuse(self.changing)

    def start_step(self) -> None:
        """A step begins: remember the buffers as they are before it."""
        self._steps += 1
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Remember the buffers as they are, for `restore`."""
        for b in self._buffers:
            if b.mode is not None or b.travels:
                b.before = b.tensor.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what was done to the buffers since they were remembered."""
        for b in self._buffers:
            if b.before is not None and b.mode != "local" and is_plain(b.tensor):
                b.tensor.copy_(b.before)
                b.mark = mark(b.tensor)

    def accept(self) -> None:
        """Take the buffers as they are now for unchanged: they were loaded, or broadcast."""
        for b in self._buffers:
            current = b.owner._buffers.get(b.key)
            if current is not None:
                b.tensor, b.mark = current, mark(current)
        self._contents = fingerprints(self._constants())

    def _constants(self) -> list[tuple[str, Tensor]]:
        return [(b.name, b.tensor) for b in self._buffers if b.mode is None or self.fixed]

    def changes(self) -> list[float]:
        """Return for each buffer 1 if it changed on this rank, and whether there are others than before; then `start`.

        A rank without examples changes nothing.
        """
        changed = [self._changed(b) for b in self._buffers]
        if self.fixed or (self.size > 1 and is_due(self._steps - 1)):
            unlike = set(differing(self._contents, fingerprints(self._constants())))
            changed = [already or b.name in unlike for already, b in zip(changed, self._buffers, strict=True)]
        return [*map(float, changed), float(self._other_buffers() is not None)]

    def _changed(self, b: Buffer) -> bool:
        current = b.owner._buffers.get(b.key)
        if current is not b.tensor and current is not None and not b.persistent and not b.declared:
            b.tensor, b.mark = current, mark(current)  # a cache, computed again
            self._contents |= fingerprints([(b.name, current)])
        # torch's layers leave no mark where they write their statistics.
        unmarked = b.declared or (b.mode is not None and b.owner.training)
        return mark(b.tensor) != b.mark or (unmarked and not self.fixed)

    def _other_buffers(self) -> str | None:
        """Return what is wrong if a buffer is another tensor than it was, or was registered since."""
        for b in self._buffers:
            if b.owner._buffers.get(b.key) is not b.tensor:
                return rebound(b)
        if self.size > 1 and any(len(names) != count for names, count in self._modules):
            known = {b.name for b in self._buffers}
            for name, tensor in self.model.named_buffers():
                added = self._track(name, tensor)
                if name not in known and added.persistent:
                    return (
                        f"training registers the buffer {added.title}, so that it cannot be kept the same on all "
                        "ranks: register it in the constructor"
                    )
        return None

    def start(self, share: float) -> None:
        """Start combining the buffers that travel. share: this rank's of the global batch; they add up to 1."""
        self._share = share
        if self.size > 1:
            self._travelling = self._send([b for b in self._buffers if b.travels], "step.buffers")

    def finish(self, changed: Sequence[float]) -> None:
        """Wait, and put what was combined into the buffers. changed: what `changes` returned, summed over ranks.

        Raises UserError on all ranks for a change that cannot be kept the same on them.
        """
        if changed[-1]:
            problems = collectives.gather_json(self._other_buffers(), "buffers.others")
            raise UserError(next(filter(None, problems)))
        new = [b for b, ranks in zip(self._buffers, changed, strict=False) if ranks and not b.travels]
        self._refuse(new)
        if self._travelling is not None:
            self._receive(self._travelling, changed)
            self._travelling = None
        if self.size > 1 and new:
            self._receive(self._send(new, "step.buffers.first"), changed)
        for b in new:
            b.travels = True
        for b, ranks in zip(self._buffers, changed, strict=False):
            if ranks:
                b.mark = mark(b.tensor)

    def _refuse(self, changed: list[Buffer]) -> None:
        if self.fixed and changed:
            raise UserError(
                f"--deterministic: training changes the buffer {changed[0].title}, which depends on the number of "
                "ranks; use a layer without such buffers, GroupNorm for instance"
            )
        unknown = [b for b in changed if b.mode is None]
        if not unknown:
            return
        line = ", ".join(f'"{b.name}": "rank0"' for b in unknown)
        advice = f"add to {self.recipe}: buffers = {{{line}}}{OTHERS}"
        if self.size > 1:
            raise UserError(
                f"training changes the buffer {unknown[0].title}, and how its values on {self.size} ranks are to be "
                f"combined is not known: {advice}"
            )
        if not self._warned.issuperset(b.name for b in unknown):
            self._warned |= {b.name for b in unknown}
            self._warnings.append(
                f"buffers   training changes the buffer {unknown[0].title}; before it is trained on several ranks, "
                f"{advice}"
            )

    def _send(self, buffers: list[Buffer], name: str) -> Travelling:
        travelling = _sort(buffers)
        if travelling.floats:
            flat = torch.cat([self._contribution(b) for b in travelling.floats])
            travelling.flats.append(flat)
            travelling.handles.append(collectives.all_reduce_async_(flat, name))
        if travelling.integers:
            differences = [b.tensor.to(torch.int64) - value_before(b).to(torch.int64) for b in travelling.integers]
            flat = torch.cat([difference.reshape(-1) for difference in differences])
            travelling.flats.append(flat)
            travelling.handles.append(collectives.all_reduce_async_(flat, f"{name}.integers"))
        if travelling.raw:
            flat = torch.cat([_bytes(b.tensor) for b in travelling.raw])
            travelling.flats.append(flat)
            travelling.handles.append(collectives.broadcast_async_(flat, f"{name}.rank0"))
        return travelling

    def _contribution(self, b: Buffer) -> Tensor:
        """(n,) float64: what this rank adds to the sum over ranks."""
        value = _float64(b.tensor)
        if b.mode == "rank0":
            return value if collectives.rank() == 0 else torch.zeros_like(value)
        if b.mode == "sum":
            return value - _float64(value_before(b))
        if self._share == 0:  # or what is not finite would become NaN
            return torch.zeros_like(value)
        return (value if b.is_float() else value - _float64(value_before(b))) * self._share

    @torch.no_grad()
    def _receive(self, travelling: Travelling, changed: Sequence[float]) -> None:
        for handle in travelling.handles:
            collectives.wait(handle)
        flats = iter(travelling.flats)
        touched = {b for b, ranks in zip(self._buffers, changed, strict=False) if ranks}
        if travelling.floats:
            parts = torch.split(next(flats), [_float64(b.tensor).numel() for b in travelling.floats])
            for b, part in zip(travelling.floats, parts, strict=True):
                if b not in touched:
                    continue
                if b.mode == "sum":
                    part = part + _float64(value_before(b))
                if b.tensor.is_complex():
                    part = torch.view_as_complex(part.view(-1, 2))
                if b.mode == "mean" and not b.is_float():
                    b.tensor.copy_(value_before(b) + part.round().view(b.tensor.shape).to(b.tensor.dtype))
                else:
                    b.tensor.copy_(part.view(b.tensor.shape))
        if travelling.integers:
            parts = torch.split(next(flats), [b.tensor.numel() for b in travelling.integers])
            for b, part in zip(travelling.integers, parts, strict=True):
                b.tensor.copy_(value_before(b).to(torch.int64) + part.view(b.tensor.shape))
        if travelling.raw:
            parts = torch.split(next(flats), [b.tensor.nbytes for b in travelling.raw])
            for b, part in zip(travelling.raw, parts, strict=True):
                b.tensor.copy_(part.clone().view(b.tensor.dtype).view(b.tensor.shape))


def _sort(buffers: list[Buffer]) -> Travelling:
    travelling = Travelling()
    for b in buffers:
        if b.mode == "rank0" and (b.declared or b.is_float()):
            travelling.raw.append(b)
        elif b.mode == "sum" and not b.is_float():
            travelling.integers.append(b)
        elif b.mode in ("mean", "sum", "rank0"):
            travelling.floats.append(b)
    return travelling


def _float64(tensor: Tensor) -> Tensor:
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return plain.detach().reshape(-1).to(torch.float64)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
