"""An optimizer's hyperparameters when a run is resumed: the checkpoint's, but for those that are given again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.system.errors import UserError

SCALAR_TYPES = (bool, int, float, str, tuple, type(None))
IMPLEMENTATION_FLAGS = ("foreach", "fused", "capturable", "differentiable")  # a step is computed, not what it is
# torch's own formats, whose values are of any type.
ParamGroup = dict[str, Any]  # of an optimizer: its "params" and their hyperparameters, by name
StateDict = dict[str, Any]  # of a model, an optimizer or a checkpoint


def get_hyperparameters(groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """Return what a new optimizer's parameter groups were given, by group: weight_decay, betas ..."""
    return [
        {k: v for k, v in group.items() if isinstance(v, SCALAR_TYPES) and k not in IMPLEMENTATION_FLAGS}
        for group in groups
    ]


def apply_overrides(groups: Sequence[ParamGroup], given: Sequence[ParamGroup], earlier: Sequence[ParamGroup]) -> None:
    """Set the numbers that differ from those the run began with in groups that a checkpoint has restored.

    Others stay as restored: some optimizers count steps there.

    Args:
        groups: the optimizer's, restored.
        given: what each group was given now.
        earlier: what each group was given when the checkpoint was written.

    Raises:
        UserError: a change would need another optimizer state: a switch, a name, or momentum from or to 0.
    """
    for group, now, before in zip(groups, given, earlier, strict=True):
        changed = {name: value for name, value in now.items() if value != before.get(name, value)}
        for name, value in changed.items():
            number = isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
            if not number or (name == "momentum" and 0 in (value, before[name])):
                text = f"the optimizer's {name} was {before[name]!r} and is {value!r} now"
                raise UserError(f"{text}: it cannot be changed on --resume")
        group.update(changed)
