"""How an optimizer may be divided among ranks, found out by trying it; and how buckets are cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hvdtrain.exchange.partition import Partition
from hvdtrain.system.errors import UserError
from hvdtrain.torch.shard_trial import check_memory, try_units
from tests.ranks.changing_recipes import Lion
from tests.ranks.sharded_recipes import GlobalNorm, Lars

Params = list[nn.Parameter]


class LargeMatrices(torch.optim.SGD):
    """Divides gradients of matrices with 128 rows and columns or more by their norm."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.dim() == 2 and min(p.shape) >= 128:
                p.grad /= p.grad.norm()
        super().step()


class Noisy(torch.optim.SGD):
    """Adds noise to gradients."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.grad += torch.randn_like(p.grad)
        super().step()


class Holds(torch.optim.SGD):
    """Updates what it was given at first, not what its groups hold."""

    def __init__(self, params: Params, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.held = params

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in self.held:
            if p.grad is not None:
                p.data -= p.grad


def make_params() -> Params:
    shapes = [(7, 9), (9,), (), (8, 4, 3, 3), (200, 150)]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize(
    ("make", "unit", "state_bytes"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), "elements", 0),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), "elements", 4),
        (lambda params: torch.optim.AdamW(params, lr=0.0), "elements", 8),
        (lambda params: torch.optim.Adam(params, amsgrad=True), "elements", 12),
        (lambda params: torch.optim.Adagrad(params), "elements", 4),
        (lambda params: Lion(params, 0.1, 0.9), "elements", 4),
        (lambda params: torch.optim.Adafactor(params), "parameters", 0),
        (lambda params: torch.optim.Muon([p for p in params if p.dim() == 2]), "parameters", 0),
        (lambda params: Lars(params, lr=0.1), "parameters", 0),
        (lambda params: LargeMatrices(params, lr=0.1), "parameters", 0),
    ],
)
def test_optimizers_are_recognized_by_trying_them(
    make: Callable[[Params], torch.optim.Optimizer], unit: str, state_bytes: int
) -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    found = try_units(make(params), "Recipe")
    assert found.unit == unit
    assert found.state_bytes == pytest.approx(state_bytes, rel=1e-3)  # not counted: of a parameter without axes
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda params: GlobalNorm(params, lr=0.1), "depends on the others, or on random numbers"),
        (lambda params: Noisy(params, lr=0.1), "depends on the others, or on random numbers"),
        (lambda params: Holds(params, 0.1), "it does not update the parameters of its groups"),
        (lambda params: torch.optim.SparseAdam(params), "SparseAdam does not support dense gradients"),
    ],
)
def test_others_are_refused_by_name(make: Callable[[Params], torch.optim.Optimizer], text: str) -> None:
    optimizer = make(make_params())
    with pytest.raises(UserError, match=f"Recipe.optimizer: {type(optimizer).__name__} cannot be divided.*{text}"):
        try_units(optimizer, "Recipe")


def test_a_hook_before_the_step_is_refused() -> None:
    optimizer = torch.optim.SGD(make_params(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(UserError, match="SGD has a hook before its step"):
        try_units(optimizer, "Recipe")


def test_parameters_that_share_memory_are_refused() -> None:
    model = nn.Module()
    memory = torch.zeros(10)
    model.a, model.b = nn.Parameter(memory[:6]), nn.Parameter(memory[5:])
    with pytest.raises(UserError, match="the parameters a and b share memory"):
        check_memory(model)
    model.b = nn.Parameter(memory[6:])
    check_memory(model)


def test_buckets_are_cut_evenly_or_between_parameters() -> None:
    named = [(str(size), nn.Parameter(torch.zeros(size))) for size in (5, 3, 2)]
    assert Partition(3, "elements").cut_bucket(named, [5, 3, 2]) == (named, [0, 4, 7, 10])
    members, bounds = Partition(2, "parameters").cut_bucket(named, [5, 3, 2])
    assert ([name for name, _ in members], bounds) == (["5", "3", "2"], [0, 5, 10])
    complex_numbers = [("c", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))]
    assert Partition(2, "elements").cut_bucket(complex_numbers, [6])[1] == [0, 4, 6]
