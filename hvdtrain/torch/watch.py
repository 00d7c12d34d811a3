"""Detects changes of parameters, or of the optimizer's learning rate, other than hvdtrain's own update.

The update gives all ranks the same parameters because it makes the same step with the same gradients. What `score`
writes into them is the same on all ranks only if it does not depend on the examples:

    a teacher that follows the weights (BYOL), weights clamped     allowed: checked over ranks, by checksums
    an initialisation from the first batch (ActNorm), max_norm     refused, by name

A rank without examples does not call `score`: it is sent the parameters as the others, which agree, have changed them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from hvdtrain.comm import collectives
from hvdtrain.exchange.checksums import checksum_tensor
from hvdtrain.system.errors import UserError
from hvdtrain.torch.hyperparameters import ParamGroup
from hvdtrain.torch.tensors import (
    TensorVersion,
    describe_layer,
    find_differing,
    fingerprint_tensors,
    is_content_check_due,
    is_writable_in_place,
    read_version,
)


@dataclass(frozen=True)
class ParameterReport:
    """What a rank reports of the parameters that `score` has changed."""

    score_calls: int  # how often it called score in this step
    checksums: dict[str, int]  # checksums of those that it changed, by name


def find_divergent_parameter(reports: Sequence[ParameterReport]) -> str | None:
    """Return the first parameter that ranks which called score have changed differently, or None."""
    called = [report.checksums for report in reports if report.score_calls]
    names = dict.fromkeys(name for sums in called for name in sums)
    return next((name for name in names if len({sums.get(name) for sums in called}) > 1), None)


class ParameterWatch:
    """Compares over ranks the parameters that something other than the update has changed.

    A step is `start_step`, the forward passes, `detect_changes`, and with the number of ranks that had any,
    `reconcile_parameters`; `set_baseline` after the update.
    """

    def __init__(self, recipe: str, model: nn.Module, size: int, fixed: bool) -> None:
        """fixed: no parameter may change (--deterministic)."""
        self.recipe_name, self.model, self.forbids_changes = recipe, model, fixed
        self._named_parameters = list(model.named_parameters())
        self.set_world_size(size)
        self.set_baseline()

    def set_world_size(self, size: int) -> None:
        """Begin with `size` ranks, whose parameters are the same."""
        self.world_size = size
        self._steps = self._num_comparisons = 0
        self._untracked_writes: set[str] = set()  # those that were written without leaving a mark
        self._fingerprints: dict[str, Tensor] = {}
        self._changed_names: list[str] = []

    def set_baseline(self) -> None:
        """Take the parameters as they are now for what they should be."""
        self._versions: list[TensorVersion] = [read_version(p) for _, p in self._named_parameters]

    def start_step(self) -> None:
        """Start a step: remember the parameters as they are before it."""
        self._fingerprints = {}
        if self.forbids_changes or (self.world_size > 1 and is_content_check_due(self._steps)):
            self._fingerprints = fingerprint_tensors(self._named_parameters)
        elif self._untracked_writes:
            self._fingerprints = fingerprint_tensors(
                [(name, p) for name, p in self._named_parameters if name in self._untracked_writes]
            )
        self._steps += 1

    def detect_changes(self) -> bool:
        """Return whether this rank's parameters have changed since `set_baseline`."""
        marked: list[str] = []
        if self.world_size > 1 and not self.forbids_changes:
            marked = [
                name
                for (name, p), old in zip(self._named_parameters, self._versions, strict=True)
                if read_version(p) != old
            ]
        if self._fingerprints:
            now = fingerprint_tensors([(name, p) for name, p in self._named_parameters if name in self._fingerprints])
            found = find_differing(self._fingerprints, now)
            self._untracked_writes |= set(found) - set(marked)
            marked += [name for name in found if name not in marked]
        self._changed_names = marked
        return bool(marked)

    def reconcile_parameters(self, ranks: int, passes: int, local_steps: int | None = None) -> None:
        """Check that all ranks have changed their parameters in the same way.

        Args:
            ranks: how many have changed any.
            passes: how often this rank has called score.
            local_steps: of --local-steps, which refuse that.

        Raises:
            UserError: on all ranks, if they differ.
        """
        if self.forbids_changes:
            name = next((n for r in self._gather_reports(passes) for n in r.checksums), "?")
            raise UserError(
                f"--deterministic: score changes the parameter {name!r}, as often as it is called, which depends on "
                "the number of ranks; leave out --deterministic, or change it in the optimizer's step"
            )
        if self.world_size == 1:
            return
        if local_steps is not None:
            name = next((n for r in self._gather_reports(passes) for n in r.checksums), "?")
            raise UserError(
                f"--local-steps {local_steps}: {self.recipe_name}.score changes the parameter {name!r}, which "
                "would then differ between the ranks; leave out --local-steps, or make it a buffer and declare in "
                "buffers how it is combined"
            )
        self._num_comparisons += 1
        if ranks == self.world_size and not is_content_check_due(self._num_comparisons - 1):
            return
        reports = self._gather_reports(passes)
        different = find_divergent_parameter(reports)
        if different is not None:
            layer = describe_layer(self.model, different)
            calls = [report.score_calls for report in reports if report.score_calls]
            uneven = f" (it is called {min(calls)} to {max(calls)} times on a rank)" if len(set(calls)) > 1 else ""
            raise UserError(
                f"{self.recipe_name}.score changes the parameter {different!r} of {layer} differently on each rank"
                f"{uneven}: what it is changed to must not depend on the examples; initialise it from dataset('train') "
                "in model(), or train on one rank"
            )
        root = next(rank for rank, report in enumerate(reports) if report.score_calls)
        if any(not report.score_calls for report in reports):
            named = dict(self._named_parameters)
            for changed in reports[root].checksums:
                if is_writable_in_place(named[changed]):
                    self._broadcast_parameter(named[changed], changed, root)

    @torch.no_grad()
    def _broadcast_parameter(self, p: Tensor, name: str, root: int) -> None:
        flat = p.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).clone()
        collectives.broadcast_(flat, f"watch.{name}", root)
        p.copy_(flat.view(p.dtype).view(p.shape))

    def _gather_reports(self, passes: int) -> list[ParameterReport]:
        named = dict(self._named_parameters)
        mine: Any = [passes, {name: int(checksum_tensor(named[name])) for name in self._changed_names}]
        return [ParameterReport(*report) for report in collectives.gather_json(mine, "watch.parameters")]


class LearningRateWatch:
    """Remembers the learning rates that hvdtrain has set, to detect others."""

    def __init__(self, recipe: str) -> None:
        self.recipe_name = recipe
        self._own_rates: list[float] | None = None

    def set_baseline(self, groups: Sequence[ParamGroup]) -> None:
        """Take the rates that the groups have now for hvdtrain's own."""
        self._own_rates = [group["lr"] for group in groups]

    def has_changed(self, groups: Sequence[ParamGroup]) -> bool:
        """Return whether a group's rate is not what it was at `set_baseline`."""
        return self._own_rates is not None and any(
            group["lr"] is not own and float(group["lr"]) != float(own)
            for group, own in zip(groups, self._own_rates, strict=False)
        )

    def build_error(self) -> UserError:
        """Return the error for a recipe that sets learning rates."""
        return UserError(
            f"{self.recipe_name} changes the learning rate of its optimizer itself, which hvdtrain sets in each step: "
            "leave out its scheduler, and name a schedule instead, e.g. schedule = 'warmup:5ep cosine' or --schedule"
        )


def reject_scheduler(recipe: Any, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise UserError if a recipe has made a learning-rate scheduler for an optimizer, which would have no effect."""
    kept = next((type(value).__name__ for value in vars(recipe).values() if isinstance(value, LRScheduler)), None)
    if kept is None and not any(hasattr(optimizer.step, "_wrapped_by_lr_sched") for optimizer in optimizers):
        return
    raise UserError(
        f"{type(recipe).__name__} makes a learning-rate scheduler{f' ({kept})' if kept else ''}, and hvdtrain sets the "
        "learning rate in each step itself: leave it out, and name a schedule instead, e.g. schedule = "
        "'warmup:5ep cosine' or --schedule"
    )
