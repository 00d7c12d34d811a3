"""The slow digits in two stages; ranks can be lost while others are at another point of the same step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from hvdtrain.comm import collectives
from hvdtrain.training.held_update import HeldUpdate
from tests.ranks.slow_recipe import SlowDigits

make_together = HeldUpdate.make_together


@dataclass(kw_only=True)
class SlowStages(SlowDigits):
    """digits, slowly, cut after the convolutions; the fault file may say before:STEP or split:STEP."""

    fault_file: ClassVar[Path] = Path()

    def model(self) -> torch.nn.Module:
        SlowStages.fault_file = Path(self.fault)
        return super().model()

    def stages(self, model: torch.nn.Module) -> Sequence[str]:
        return ["2"]


def make_apart(held: HeldUpdate, update: partial[Any]) -> Any:
    """In the step that the fault file names, lose rank 3 before all ranks can update, or rank 2 when some have."""
    file = SlowStages.fault_file
    fault, _, step = (file.read_text() if file.is_file() else "").partition(":")
    if not step or update.args[1].step != int(step) or collectives.size() != 4:
        return make_together(held, update)
    rank = collectives.rank()
    if fault == "before" and rank != 3:
        return make_together(held, update)
    if fault == "split":  # of the second column no rank has noticed that all can update
        held.update = update
        collectives.barrier("step.held")
        if rank in (1, 3):
            raise collectives.PeersLost("split")
        held.update = None
        if rank == 0:
            return update()
    file.unlink()
    os._exit(9)


make: Callable[..., Any] = make_apart
HeldUpdate.make_together = make  # type: ignore[method-assign]
