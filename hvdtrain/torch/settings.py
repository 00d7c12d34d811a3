"""An optimizer's settings where a run is resumed: the checkpoint's, but for those that are chosen otherwise now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PLAIN = (bool, int, float, str, tuple, type(None))
Settings = dict[str, Any]  # of a parameter group, by name


def settings_of(groups: Sequence[Settings]) -> list[Settings]:
    """What a new optimizer's parameter groups were given: weight_decay, betas ..."""
    return [{name: value for name, value in group.items() if isinstance(value, PLAIN)} for group in groups]


def change(groups: Sequence[Settings], given: Sequence[Settings], earlier: Sequence[Settings]) -> None:
    """Set in restored groups what is given now and was not given earlier.

    Other values stay: some optimizers count their steps there.
    """
    for group, now, before in zip(groups, given, earlier, strict=True):
        group.update({name: value for name, value in now.items() if value != before.get(name, value)})
