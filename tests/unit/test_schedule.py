"""Schedules as text."""

from __future__ import annotations

import math

import pytest

from hvdtrain.system.errors import UserError
from hvdtrain.training.schedule import parse_schedule


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


@pytest.mark.parametrize(
    "text", ["", "warmup", "step", "step: x0.1", "step:3ep 0.1", "cosine:2", "linear linear", "constant:1"]
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_schedule(text, 100, 10)
