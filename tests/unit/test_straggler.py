"""Naming the straggler from a table of times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.diagnosis.straggler import (
    MIN_COMPARED_STEPS,
    NON_WAIT_INDEXES,
    TIME_PARTS,
    WAIT_INDEX,
    StepTimes,
    Straggler,
    find_straggler,
)


def table(own: StepTimes) -> StepTimes:
    """The times of steps in which all wait for the last. own: (steps, ranks, PARTS), whose waits are overwritten."""
    busy = own[:, :, NON_WAIT_INDEXES].sum(axis=2)
    times = own.copy()
    times[:, :, WAIT_INDEX] = 0.002 + busy.max(axis=1, keepdims=True) - busy
    return times


def noisy(draw: np.random.Generator, steps: int, ranks: int, noise: float) -> StepTimes:
    """Steps of about 0.1 s on equal ranks, each of whose parts varies by so much, now and then by ten times as much."""
    own = np.abs(draw.normal([0.02, 0.07, 0, 0.01], noise, (steps, ranks, len(TIME_PARTS))))
    return own + (draw.random(own.shape) < 0.05) * 10 * noise


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(MIN_COMPARED_STEPS, 60),
    ranks=st.integers(2, 12),
    part=st.sampled_from(NON_WAIT_INDEXES),
    noise=st.sampled_from([0.0, 0.001, 0.004]),
    longer=st.floats(0.25, 1.0),
)
def test_the_slow_rank_and_its_part_are_named(
    seed: int, steps: int, ranks: int, part: int, noise: float, longer: float
) -> None:
    draw = np.random.default_rng(seed)
    rank = int(draw.integers(ranks))
    own = noisy(draw, steps, ranks, noise)
    own[:, rank, part] += longer
    found = find_straggler(table(own))
    assert found is not None and (found.rank, found.cause) == (rank, TIME_PARTS[part])
    assert found.cost == pytest.approx(longer, abs=10 * noise + 1e-9)
    assert found.longer == pytest.approx(longer, abs=10 * noise + 1e-9)
    assert 0 < found.share < 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 16])
@pytest.mark.parametrize("noise", [0.0, 0.001, 0.02, 0.2])
def test_equal_ranks_are_not_named(ranks: int, noise: float) -> None:
    """Chance names somebody once in hundreds of intervals of ten steps at most, and never in long ones."""
    draw = np.random.default_rng(ranks)
    named = [find_straggler(table(noisy(draw, 10, ranks, noise))) is not None for _ in range(500)]
    assert sum(named) <= 3
    assert not any(find_straggler(table(noisy(draw, 100, ranks, noise))) for _ in range(50))


def constant(*compute: float) -> StepTimes:
    """Twelve steps that are all the same."""
    own = np.zeros((12, len(compute), len(TIME_PARTS)))
    own[:, :, TIME_PARTS.index("compute")] = compute
    return table(own)


def test_only_a_clearly_slow_rank_is_named() -> None:
    found = find_straggler(constant(0.1, 0.1, 0.15))
    assert found == Straggler(2, pytest.approx(0.05), pytest.approx(0.05 / 0.152), "compute", pytest.approx(0.05))
    assert find_straggler(constant(0.1)) is None  # nobody waits for it
    assert find_straggler(constant(0.1, 0.1, 0.105)) is None  # too little
    assert find_straggler(constant(0.1, 0.2, 0.2)) is None  # one fast rank is no straggler, nor are the other two
    host = find_straggler(constant(0.1, 0.1, 0.2, 0.2))  # two ranks of one slow host
    assert host is not None and host.rank in (2, 3)
    assert find_straggler(constant(0.1, 0.2)[: MIN_COMPARED_STEPS - 1]) is None  # too few steps


def test_a_rank_that_is_slow_in_every_other_step_is_not_clear() -> None:
    own = np.full((20, 4, len(TIME_PARTS)), 0.05)
    own[::2, 1, TIME_PARTS.index("data")] += 0.3
    assert find_straggler(table(own)) is None
