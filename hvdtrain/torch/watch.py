"""Notices what changes parameters, or the optimizer's learning rate, besides hvdtrain's own update.

The update gives all ranks the same parameters because it makes the same step with the same gradients. What `score`
writes into them is the same on all ranks only if it does not depend on the examples:

    a teacher that follows the weights (BYOL), weights clamped     allowed: checked over ranks, by checksums
    an initialisation from the first batch (ActNorm), max_norm     refused, by name

A rank without examples does not call `score`: it takes over what the others, which agree, have made of a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from hvdtrain.comm import collectives
from hvdtrain.exchange.checksums import checksum
from hvdtrain.exchange.tensors import Mark, differing, fingerprints, is_due, is_plain, layer_of, mark
from hvdtrain.system.errors import UserError


@dataclass(frozen=True)
class Report:
    """What a rank reports of the parameters that `score` has changed."""

    passes: int  # how often it called score in this step
    sums: dict[str, int]  # checksums of those that it changed, by name


def find_difference(reports: Sequence[Report]) -> str | None:
    """Return the first parameter that ranks which called score have changed differently, or None."""
    called = [report.sums for report in reports if report.passes]
    names = dict.fromkeys(name for sums in called for name in sums)
    return next((name for name in names if len({sums.get(name) for sums in called}) > 1), None)


class ParameterWatch:
    """Compares over ranks the parameters that something else than the update has changed.

    `start_step`, then the forward passes, `changes`, and with the number of ranks that had any, `agree`; `accept` after
    the update.
    """

    def __init__(self, recipe: str, model: nn.Module, size: int, fixed: bool) -> None:
        """fixed: no parameter may change (--deterministic)."""
        self.recipe, self.model, self.fixed = recipe, model, fixed
        self._named = list(model.named_parameters())
        self.start_world(size)
        self.accept()

    def start_world(self, size: int) -> None:
        """Begin with so many ranks, whose parameters are the same."""
        self.size = size
        self._steps = self._compared = 0
        self._unmarked: set[str] = set()  # those that were written without leaving a mark
        self._contents: dict[str, Tensor] = {}
        self._changed: list[str] = []

    def accept(self) -> None:
        """Take the parameters as they are now for what they should be."""
        self._marks: list[Mark] = [mark(p) for _, p in self._named]

    def start_step(self) -> None:
        """A step begins."""
        self._contents = {}
        if self.fixed or (self.size > 1 and is_due(self._steps)):
            self._contents = fingerprints(self._named)
        elif self._unmarked:
            self._contents = fingerprints([(name, p) for name, p in self._named if name in self._unmarked])
        self._steps += 1

    def changes(self) -> bool:
        """Return whether this rank's parameters have changed since `accept`."""
        marked: list[str] = []
        if self.size > 1 and not self.fixed:
            marked = [name for (name, p), old in zip(self._named, self._marks, strict=True) if mark(p) != old]
        if self._contents:
            now = fingerprints([(name, p) for name, p in self._named if name in self._contents])
            found = differing(self._contents, now)
            self._unmarked |= set(found) - set(marked)
            marked += [name for name in found if name not in marked]
        self._changed = marked
        return bool(marked)

    def agree(self, ranks: int, passes: int) -> None:
        """Make sure that all ranks have changed their parameters alike. ranks: how many have changed any.

        Raises UserError on all ranks if they have not.
        """
        if self.fixed:
            name = next((n for r in self._gather(passes) for n in r.sums), "?")
            raise UserError(
                f"--deterministic: score changes the parameter {name!r}, as often as it is called, which depends on "
                "the number of ranks; leave out --deterministic, or change it in the optimizer's step"
            )
        if self.size == 1:
            return
        self._compared += 1
        if ranks == self.size and not is_due(self._compared - 1):
            return
        reports = self._gather(passes)
        different = find_difference(reports)
        if different is not None:
            layer = layer_of(self.model, different)
            calls = [report.passes for report in reports if report.passes]
            uneven = f" (it is called {min(calls)} to {max(calls)} times on a rank)" if len(set(calls)) > 1 else ""
            raise UserError(
                f"{self.recipe}.score changes the parameter {different!r} of {layer} differently on each rank"
                f"{uneven}: what it is changed to must not depend on the examples; initialise it from dataset('train') "
                "in model(), or train on one rank"
            )
        root = next(rank for rank, report in enumerate(reports) if report.passes)
        if any(not report.passes for report in reports):
            named = dict(self._named)
            for changed in reports[root].sums:
                if is_plain(named[changed]):
                    self._take_over(named[changed], changed, root)

    @torch.no_grad()
    def _take_over(self, p: Tensor, name: str, root: int) -> None:
        flat = p.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).clone()
        collectives.broadcast_(flat, f"watch.{name}", root)
        p.copy_(flat.view(p.dtype).view(p.shape))

    def _gather(self, passes: int) -> list[Report]:
        named = dict(self._named)
        mine: Any = [passes, {name: int(checksum(named[name])) for name in self._changed}]
        return [Report(*report) for report in collectives.gather_json(mine, "watch.parameters")]


class LearningRates:
    """The learning rates that hvdtrain has set, by which those that somebody else has set are noticed."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self._own: list[float] | None = None

    def accept(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take the rates that the groups have now for hvdtrain's own."""
        self._own = [group["lr"] for group in groups]

    def changed(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether a group's rate is not what it was at `accept`."""
        return self._own is not None and any(
            group["lr"] is not own and float(group["lr"]) != float(own)
            for group, own in zip(groups, self._own, strict=False)
        )

    def refuse(self) -> UserError:
        return UserError(
            f"{self.recipe} changes the learning rate of its optimizer itself, which hvdtrain sets in each step: leave "
            "out its scheduler, and name a schedule instead, e.g. schedule = 'warmup:5ep cosine' or --schedule"
        )


def refuse_scheduler(recipe: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError if a recipe has made a learning-rate scheduler for its optimizer, which would have no effect."""
    kept = next((type(value).__name__ for value in vars(recipe).values() if isinstance(value, LRScheduler)), None)
    if kept is None and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    raise UserError(
        f"{type(recipe).__name__} makes a learning-rate scheduler{f' ({kept})' if kept else ''}, and hvdtrain sets the "
        "learning rate in each step itself: leave it out, and name a schedule instead, e.g. schedule = "
        "'warmup:5ep cosine' or --schedule"
    )
