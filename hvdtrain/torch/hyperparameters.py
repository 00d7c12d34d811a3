"""An optimizer's settings where a run is resumed: the checkpoint's, but for those that are chosen otherwise now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.system.errors import UserError

PLAIN = (bool, int, float, str, tuple, type(None))
HOW = ("foreach", "fused", "capturable", "differentiable")  # a step is computed, not what it is
Settings = dict[str, Any]  # of a parameter group, by name


def settings_of(groups: Sequence[Settings]) -> list[Settings]:
    """What a new optimizer's parameter groups were given: weight_decay, betas ..."""
    return [{k: v for k, v in group.items() if isinstance(v, PLAIN) and k not in HOW} for group in groups]


def change(groups: Sequence[Settings], given: Sequence[Settings], earlier: Sequence[Settings]) -> None:
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
