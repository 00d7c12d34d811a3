"""An optimizer's settings where a run is resumed: the checkpoint's, but for those that are chosen otherwise now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.system.errors import UserError

SCALAR_TYPES = (bool, int, float, str, tuple, type(None))
IMPLEMENTATION_FLAGS = ("foreach", "fused", "capturable", "differentiable")  # a step is computed, not what it is
Hyperparameters = dict[str, Any]  # of a parameter group, by name


def get_hyperparameters(groups: Sequence[Hyperparameters]) -> list[Hyperparameters]:
    """What a new optimizer's parameter groups were given: weight_decay, betas ..."""
    return [
        {k: v for k, v in group.items() if isinstance(v, SCALAR_TYPES) and k not in IMPLEMENTATION_FLAGS}
        for group in groups
    ]


def apply_overrides(
    groups: Sequence[Hyperparameters], given: Sequence[Hyperparameters], earlier: Sequence[Hyperparameters]
) -> None:
    """Set in restored groups the numbers that are given now and were not earlier. Others stay: some count steps there.

    Raises UserError for what an optimizer has a state for, or none: a switch, a name, momentum or none.
    """
    for group, now, before in zip(groups, given, earlier, strict=True):
        changed = {name: value for name, value in now.items() if value != before.get(name, value)}
        for name, value in changed.items():
            number = isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
            if not number or (name == "momentum" and 0 in (value, before[name])):
                text = f"the optimizer's {name} was {before[name]!r} and is {value!r} now"
                raise UserError(f"{text}: it cannot be changed on --resume")
        group.update(changed)
