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
from hvdtrain.system.errors import UserError
from hvdtrain.torch import tensors
from hvdtrain.torch.buffers import Buffer, BufferMode, describe_rebinding, find_builtin_mode, get_previous_value
from hvdtrain.torch.tensors import (
    find_differing,
    fingerprint_tensors,
    is_writable_in_place,
    read_version,
    view_as_real,
)

OTHER_MODES_HINT = '  # or "mean", "sum", "local"'


@dataclass
class PendingReduction:
    """Buffers that are being reduced, joined by how they are combined."""

    float_buffers: list[Buffer] = field(default_factory=list)  # float64: means, sums of floats, small counts of rank 0
    integer_buffers: list[Buffer] = field(default_factory=list)  # int64: sums of integers
    broadcast_buffers: list[Buffer] = field(default_factory=list)  # bytes of rank 0
    flat_tensors: list[Tensor] = field(default_factory=list)
    handles: list[collectives.Handle] = field(default_factory=list)


class BufferReducer:
    """Watches a model's buffers, and combines those that change after each step as their modes say.

    A step is `start_step`, the forward passes, `detect_changes` and `start_combining`, then (with the changes summed
    over ranks) `finish_combining`. A buffer is reduced early from the step after the first in which a rank changed it.
    """

    def __init__(self, recipe: str, model: nn.Module, modes: Mapping[str, BufferMode], size: int, fixed: bool) -> None:
        """modes: those that the recipe declares, by name. fixed: no buffer may change (--deterministic)."""
        self.recipe_name, self.model, self.declared_modes = recipe, model, modes
        self.world_size, self.forbids_changes = size, fixed
        self._warnings: list[str] = []  # lines for the user, until they are taken
        self._warned: set[str] = set()
        self._buffers = [self._make_buffer(name, b) for name, b in model.named_buffers()]
        self._buffer_counts = [(module._buffers, len(module._buffers)) for module in model.modules()]
        self._pending_reduction: PendingReduction | None = None
        self._batch_share = 1.0
        self.group: collectives.Group = None  # the ranks that have the same buffers, and other parts of the batch
        self._steps = 0
        self._fingerprints = fingerprint_tensors(self._constant_buffers())

    def _make_buffer(self, name: str, b: Tensor) -> Buffer:
        owner_name, _, key = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        mode = self.declared_modes.get(name) or find_builtin_mode(owner, key)
        return Buffer(name, owner, b, mode, name in self.declared_modes, read_version(b))

    @property
    def num_change_flags(self) -> int:
        """How many numbers `changes` returns."""
        return len(self._buffers) + 1

    @property
    def changed_buffers(self) -> list[Buffer]:
        """The buffers that have changed so far."""
        return [b for b in self._buffers if b.is_reduced]

    @property
    def payload_bytes(self) -> int:
        """Bytes that a step joins to its exchange."""
        travelling = _group_by_reduction([b for b in self._buffers if b.is_reduced])
        values = [b.tensor.numel() * (2 if b.tensor.is_complex() else 1) for b in travelling.float_buffers]
        counts = [b.tensor.numel() for b in travelling.integer_buffers]
        return 8 * sum(values) + 8 * sum(counts) + sum(b.tensor.nbytes for b in travelling.broadcast_buffers)

    @property
    def local_names(self) -> set[str]:
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
        self._check_allowed_changes(found)
        for b in found:
            b.is_reduced = True

    def set_world_size(self, size: int) -> None:
        """Continue with another number of ranks, which have the same buffers."""
        self.world_size, self._pending_reduction, self._steps = size, None, 0
        self._check_allowed_changes(self.changed_buffers)

    def start_step(self) -> None:
        """Start a step: remember the buffers as they are before it."""
        self._steps += 1
        self.save_values()

    @torch.no_grad()
    def save_values(self) -> None:
        """Remember the buffers as they are, for `restore`."""
        for b in self._buffers:
            if b.mode is not None or b.is_reduced:
                b.previous_value = b.tensor.clone()

    @torch.no_grad()
    def restore_values(self) -> None:
        """Undo what was done to the buffers since they were remembered."""
        for b in self._buffers:
            if b.previous_value is not None and b.mode != "local" and is_writable_in_place(b.tensor):
                b.tensor.copy_(b.previous_value)
                b.version = read_version(b.tensor)

    def set_baseline(self) -> None:
        """Take the buffers as they are now for unchanged: they were loaded, or broadcast."""
        for b in self._buffers:
            current = b.owner._buffers.get(b.local_name)
            if current is not None:
                b.tensor, b.version = current, read_version(current)
        self._fingerprints = fingerprint_tensors(self._constant_buffers())

    def _constant_buffers(self) -> list[tuple[str, Tensor]]:
        return [(b.name, b.tensor) for b in self._buffers if b.mode is None or self.forbids_changes]

    def detect_changes(self) -> list[float]:
        """Return for each buffer 1 if it changed on this rank, and whether there are others than before; then `start`.

        A rank without examples changes nothing.
        """
        changed = [self._has_changed(b) for b in self._buffers]
        if self.forbids_changes or (self.world_size > 1 and tensors.is_content_check_due(self._steps - 1)):
            unlike = set(find_differing(self._fingerprints, fingerprint_tensors(self._constant_buffers())))
            changed = [already or b.name in unlike for already, b in zip(changed, self._buffers, strict=True)]
        return [*map(float, changed), float(self._find_structure_problem() is not None)]

    def _has_changed(self, b: Buffer) -> bool:
        current = b.owner._buffers.get(b.local_name)
        if current is not b.tensor and current is not None and not b.is_persistent and not b.is_declared:
            b.tensor, b.version = current, read_version(current)  # a cache, computed again
            self._fingerprints |= fingerprint_tensors([(b.name, current)])
        # torch's layers leave no mark when they write their statistics.
        unmarked = b.is_declared or (b.mode is not None and b.owner.training)
        return read_version(b.tensor) != b.version or (unmarked and not self.forbids_changes)

    def _find_structure_problem(self) -> str | None:
        """Return what is wrong if a buffer is another tensor than it was, or was registered since."""
        for b in self._buffers:
            if b.owner._buffers.get(b.local_name) is not b.tensor:
                return describe_rebinding(b)
        if self.world_size > 1 and any(len(names) != count for names, count in self._buffer_counts):
            known = {b.name for b in self._buffers}
            for name, tensor in self.model.named_buffers():
                added = self._make_buffer(name, tensor)
                if name not in known and added.is_persistent:
                    return (
                        f"training registers the buffer {added.description}, so that it cannot be kept the same on all "
                        "ranks: register it in the constructor"
                    )
        return None

    def start_combining(self, share: float) -> None:
        """Start combining the buffers that travel. share: this rank's of the global batch; they add up to 1."""
        self._batch_share = share
        if self.world_size > 1:
            self._pending_reduction = self._launch_collectives(
                [b for b in self._buffers if b.is_reduced], "step.buffers"
            )

    def finish_combining(self, changed: Sequence[float]) -> None:
        """Wait, and put what was combined into the buffers. changed: what `changes` returned, summed over ranks.

        Raises UserError on all ranks for a change that cannot be kept the same on them.
        """
        if changed[-1]:
            problems = collectives.gather_json(self._find_structure_problem(), "buffers.others")
            raise UserError(next(filter(None, problems)))
        new = [b for b, ranks in zip(self._buffers, changed, strict=False) if ranks and not b.is_reduced]
        self._check_allowed_changes(new)
        if self._pending_reduction is not None:
            self._apply_results(self._pending_reduction, changed)
            self._pending_reduction = None
        if self.world_size > 1 and new:
            self._apply_results(self._launch_collectives(new, "step.buffers.first"), changed)
        for b in new:
            b.is_reduced = True
        for b, ranks in zip(self._buffers, changed, strict=False):
            if ranks:
                b.version = read_version(b.tensor)

    def _check_allowed_changes(self, changed: list[Buffer]) -> None:
        if self.forbids_changes and changed:
            raise UserError(
                f"--deterministic: training changes the buffer {changed[0].description}, which depends on the "
                f"number of "
                "ranks; use a layer without such buffers, GroupNorm for instance"
            )
        unknown = [b for b in changed if b.mode is None]
        if not unknown:
            return
        line = ", ".join(f'"{b.name}": "rank0"' for b in unknown)
        advice = f"add to {self.recipe_name}: buffers = {{{line}}}{OTHER_MODES_HINT}"
        if self.world_size > 1:
            raise UserError(
                f"training changes the buffer {unknown[0].description}, and how its values on {self.world_size} "
                f"ranks are to be "
                f"combined is not known: {advice}"
            )
        if not self._warned.issuperset(b.name for b in unknown):
            self._warned |= {b.name for b in unknown}
            self._warnings.append(
                f"buffers   training changes the buffer {unknown[0].description}; before it is trained on several "
                f"ranks, "
                f"{advice}"
            )

    def _launch_collectives(self, buffers: list[Buffer], name: str) -> PendingReduction:
        travelling = _group_by_reduction(buffers)
        if travelling.float_buffers:
            flat = torch.cat([self._local_contribution(b) for b in travelling.float_buffers])
            travelling.flat_tensors.append(flat)
            travelling.handles.append(collectives.all_reduce_async_(flat, name, group=self.group))
        if travelling.integer_buffers:
            differences = [
                b.tensor.to(torch.int64) - get_previous_value(b).to(torch.int64) for b in travelling.integer_buffers
            ]
            flat = torch.cat([difference.reshape(-1) for difference in differences])
            travelling.flat_tensors.append(flat)
            travelling.handles.append(collectives.all_reduce_async_(flat, f"{name}.integers", group=self.group))
        if travelling.broadcast_buffers:
            flat = torch.cat([_view_as_bytes(b.tensor) for b in travelling.broadcast_buffers])
            travelling.flat_tensors.append(flat)
            travelling.handles.append(collectives.broadcast_async_(flat, f"{name}.rank0", group=self.group))
        return travelling

    def _local_contribution(self, b: Buffer) -> Tensor:
        """(n,) float64: what this rank adds to the sum over ranks."""
        value = _flatten_float64(b.tensor)
        if b.mode == "rank0":
            return value if collectives.rank(self.group) == 0 else torch.zeros_like(value)
        if b.mode == "sum":
            return value - _flatten_float64(get_previous_value(b))
        if self._batch_share == 0:  # or what is not finite would become NaN
            return torch.zeros_like(value)
        return (value if b.is_float() else value - _flatten_float64(get_previous_value(b))) * self._batch_share

    @torch.no_grad()
    def _apply_results(self, travelling: PendingReduction, changed: Sequence[float]) -> None:
        for handle in travelling.handles:
            collectives.wait(handle)
        flats = iter(travelling.flat_tensors)
        touched = {b for b, ranks in zip(self._buffers, changed, strict=False) if ranks}
        if travelling.float_buffers:
            parts = torch.split(next(flats), [_flatten_float64(b.tensor).numel() for b in travelling.float_buffers])
            for b, part in zip(travelling.float_buffers, parts, strict=True):
                if b not in touched:
                    continue
                if b.mode == "sum":
                    part = part + _flatten_float64(get_previous_value(b))
                if b.tensor.is_complex():
                    part = torch.view_as_complex(part.view(-1, 2))
                if b.mode == "mean" and not b.is_float():
                    b.tensor.copy_(get_previous_value(b) + part.round().view(b.tensor.shape).to(b.tensor.dtype))
                else:
                    b.tensor.copy_(part.view(b.tensor.shape))
        if travelling.integer_buffers:
            parts = torch.split(next(flats), [b.tensor.numel() for b in travelling.integer_buffers])
            for b, part in zip(travelling.integer_buffers, parts, strict=True):
                b.tensor.copy_(get_previous_value(b).to(torch.int64) + part.view(b.tensor.shape))
        if travelling.broadcast_buffers:
            parts = torch.split(next(flats), [b.tensor.nbytes for b in travelling.broadcast_buffers])
            for b, part in zip(travelling.broadcast_buffers, parts, strict=True):
                b.tensor.copy_(part.clone().view(b.tensor.dtype).view(b.tensor.shape))


def _group_by_reduction(buffers: list[Buffer]) -> PendingReduction:
    travelling = PendingReduction()
    for b in buffers:
        if b.mode == "rank0" and (b.is_declared or b.is_float()):
            travelling.broadcast_buffers.append(b)
        elif b.mode == "sum" and not b.is_float():
            travelling.integer_buffers.append(b)
        elif b.mode in ("mean", "sum", "rank0"):
            travelling.float_buffers.append(b)
    return travelling


def _flatten_float64(tensor: Tensor) -> Tensor:
    return view_as_real(tensor).detach().reshape(-1).to(torch.float64)


def _view_as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
