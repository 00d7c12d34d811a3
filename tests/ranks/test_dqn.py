"""The recipe dqn: experience made on two ranks, each with a replay memory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, train


@pytest.mark.slow
def test_dqn_balances_the_pole(tmp_path: Path, world2: KeptWorld) -> None:
    """It ends with the first evaluation that is good enough; --diagnose would find different weights."""
    summary = train(
        world2, "dqn", tmp_path / "run", "--goal", "150", "--epochs", "6", "--threads", "1", "--diagnose", timeout=110
    )
    assert summary["eval"]["return"] >= 150
    assert summary["finished"] and summary["steps"] < 1500
    assert rows(tmp_path / "run")[-1]["eval_return"] == summary["eval"]["return"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dqn_solves_cartpole(tmp_path: Path, world2: KeptWorld, seed: int) -> None:
    """The full-size run of its docstring."""
    options = ("--seed", str(seed), "--episodes", "100", "--threads", "1")
    summary = train(world2, "dqn", tmp_path / "run", *options, timeout=580)
    assert summary["eval"]["return"] >= 475
