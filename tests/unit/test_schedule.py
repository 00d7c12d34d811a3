"""Schedules as text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvdtrain.recipe.schedule import parse_schedule
from hvdtrain.system.errors import UserError
from hvdtrain.training.patience import count_evaluation
from hvdtrain.training.position import Position


def factors(text: str, total: int = 100, per_epoch: int = 10) -> list[float]:
    schedule = parse_schedule(text, total, per_epoch)
    return [schedule.factor(step) for step in range(total)]


def test_constant_schedule_keeps_the_rate() -> None:
    assert factors("constant") == [1.0] * 100


def test_cosine_is_half_a_cosine_after_the_warm_up() -> None:
    found = factors("warmup:2ep cosine")
    assert found[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert found[20:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 80)) for i in range(80)])
    assert factors("cosine:0.1")[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))


def test_linear_and_warm_up_in_steps() -> None:
    assert factors("warmup:5 linear")[5:] == pytest.approx([1 - i / 95 for i in range(95)])
    assert factors("linear:0.5")[50] == pytest.approx(0.75)
    assert factors("warmup:0.5ep")[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])


def test_step_drops_at_its_positions() -> None:
    found = factors("step:3ep,60 x0.1")
    assert found == pytest.approx([1.0] * 30 + [0.1] * 30 + [0.01] * 40)
    assert parse_schedule("step:3ep,60 x0.1", 100, 10).corners == (0, 30, 60, 99)
    assert factors("warmup:1ep step:3ep,60 x0.1")[10:] == pytest.approx([1.0] * 20 + [0.1] * 30 + [0.01] * 40)


@pytest.mark.parametrize(
    "text",
    [
        *("", "warmup", "step", "step: x0.1", "step:3ep 0.1", "cosine:2", "linear linear", "constant:1", "plateau"),
        *("plateau:3", "plateau:0 x0.5", "plateau:3 x1", "plateau:3ep x0.5", "cosine restarts", "cosine restarts:0"),
        *("cosine restarts:5 x0.5", "linear restarts:5", "onecycle:3", "invsqrt", "warmup:3 invsqrt:3", "exponential"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_schedule(text, 100, 10)


def torch_factors(make_scheduler: Callable[..., Any], steps: int = 100, **arguments: Any) -> list[float]:
    """The learning rates of one of torch's schedulers, of a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make_scheduler(optimizer, **arguments), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_shapes_equal_torchs_schedulers() -> None:
    schedulers = torch.optim.lr_scheduler
    assert factors("cosine") == pytest.approx(torch_factors(schedulers.CosineAnnealingLR, T_max=100), abs=1e-12)
    again = torch_factors(schedulers.CosineAnnealingWarmRestarts, T_0=20, T_mult=2)
    assert factors("cosine restarts:2ep x2") == pytest.approx(again, abs=1e-12)
    alike = torch_factors(schedulers.CosineAnnealingWarmRestarts, T_0=7, eta_min=0.1)
    assert factors("cosine:0.1 restarts:7") == pytest.approx(alike, abs=1e-12)
    for steps in (20, 99, 100):
        cycle = torch_factors(schedulers.OneCycleLR, steps - 1, max_lr=1.0, total_steps=steps)
        assert factors("onecycle", steps)[:-1] == pytest.approx(cycle, abs=1e-12)
    steps = torch_factors(schedulers.MultiStepLR, milestones=[30, 60], gamma=0.1)
    assert factors("step:3ep,60 x0.1") == pytest.approx(steps, abs=1e-12)


def test_one_cycle_ends_near_0_and_is_defined_for_few_steps() -> None:
    assert factors("onecycle")[-1] == pytest.approx(1 / 250_000)
    for steps in range(1, 8):
        assert all(0 < factor <= 1 for factor in factors("onecycle", steps))


def test_inverse_square_root_has_its_peak_after_the_warm_up() -> None:
    found = factors("invsqrt:10")
    assert found[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert found[10:] == pytest.approx([math.sqrt(10 / n) for n in range(11, 101)])
    assert factors("invsqrt:1ep") == found


def test_restarts_come_after_the_warm_up_and_their_steps_are_named() -> None:
    found = factors("warmup:10 cosine restarts:20 x2")
    assert found[10:] == pytest.approx(factors("cosine restarts:20 x2", 90))
    assert parse_schedule("warmup:10 cosine restarts:20 x2", 100, 10).corners == (0, 10, 30, 70, 99)


def test_plateau_lowers_the_rate_as_torchs_scheduler_does() -> None:
    """torch's waits for more than `patience` evaluations, ours for as many as are named."""
    losses = [3.0, 2.0, 2.0, 2.5, 1.9, math.nan, 2.0, 2.0, 2.0, 1.9, 1.9, 1.9, 1.8, 1.8, 1.8, 1.8]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0.0)
    schedule, position = parse_schedule("warmup:2 plateau:3 x0.5", 100, 10), Position()
    for loss in losses:
        scheduler.step(loss)
        position.eval = {"loss": loss}
        count_evaluation(position, ("loss", "min"), schedule.plateau)
        assert schedule.lr_factor(50, position.lr_drops) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.lr_factor(0, 1) == pytest.approx(0.5 / 3)
    assert (position.best_value, position.since_best, position.lr_drops) == (1.8, 3, 3)


def test_the_largest_value_is_best_if_the_recipe_says_so() -> None:
    position = Position()
    for value, since in ((0.5, 0), (0.6, 0), (0.6, 1), (math.inf, 2), (0.7, 0)):
        position.evals = {"test": {"accuracy": value}}
        count_evaluation(position, ("test/accuracy", "max"), None)
        assert position.since_best == since
