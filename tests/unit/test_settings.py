"""What is taken of an optimizer's settings on resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvdtrain.system.errors import UserError
from hvdtrain.torch.hyperparameters import apply_overrides, get_hyperparameters

Make = Callable[..., torch.optim.Optimizer]


def resumed(make: Make, before: dict[str, Any], now: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer with the settings `now` that goes on from a step of one with those `before`."""
    p = torch.nn.Parameter(torch.ones(3))
    first, second = make([p], lr=0.1, **before), make([p], lr=0.1, **now)
    given, earlier = get_hyperparameters(second.param_groups), get_hyperparameters(first.param_groups)
    p.grad = torch.ones(3)
    first.step()
    second.load_state_dict(first.state_dict())
    apply_overrides(second.param_groups, given, earlier)
    second.step()
    return second


@pytest.mark.parametrize(
    ("make", "before", "now"),
    [
        (torch.optim.AdamW, {}, {"weight_decay": 0.3}),
        (torch.optim.AdamW, {}, {"betas": (0.8, 0.95)}),
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.5}),
        (torch.optim.RMSprop, {}, {"alpha": 0.5}),
    ],
)
def test_changed_hyperparameters_apply_on_resume(make: Make, before: dict[str, Any], now: dict[str, Any]) -> None:
    group = resumed(make, before, now).param_groups[0]
    assert {name: group[name] for name in now} == now


def test_what_was_not_changed_stays() -> None:
    """Also what is not as it was made: some optimizers count there."""
    groups: list[dict[str, Any]] = [{"lr": 0.1, "counted": 7, "eps": 1e-8}]
    apply_overrides(groups, [{"lr": 0.1, "counted": 0, "eps": 1e-6}], [{"lr": 0.1, "counted": 0, "eps": 1e-8}])
    assert groups == [{"lr": 0.1, "counted": 7, "eps": 1e-6}]


@pytest.mark.parametrize(
    ("make", "now"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_hyperparameters_that_need_optimizer_state_cannot_change(make: Make, now: dict[str, Any]) -> None:
    [(name, value)] = now.items()
    with pytest.raises(UserError, match=rf"the optimizer's {name} was \S+ and is {value} now: it cannot be changed"):
        resumed(make, {}, now)


def test_implementation_flags_may_change_on_resume() -> None:
    resumed(torch.optim.AdamW, {"foreach": True}, {"foreach": False})
