"""Mixed precision, clipping and accumulation together, on ranks and alone."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, rows, run
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, train

DIGITS = str(ROOT / "recipes" / "digits.py")
EXACT = Path(__file__).parent / "exact_recipe.py"


@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-5), *slow(("bf16", 2e-2), ("fp16", 3e-3))])
def test_two_ranks_equal_one(amp: str, tolerance: float, world1: KeptWorld, world2: KeptWorld, tmp_path: Path) -> None:
    """24 steps of digits; each rank of two takes 3 passes a step, the one alone takes 6: same micro-batches' size."""
    options = ["--steps", "24", "--log-every", "1", "--clip-norm", "0.5", "--micro-batch", "22", "--amp", amp]
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    train(world1, DIGITS, alone, *options, "--threads", "1")
    train(world2, DIGITS, ranks, *options, "--threads", "1")
    pairs = list(zip(rows(alone), rows(ranks), strict=True))
    assert len(pairs) == 24
    for one, two in pairs:
        assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=5 * tolerance)
        assert one.get("loss_scale") == two.get("loss_scale")
    assert max(one["gradient_norm"] for one, _ in pairs) > 0.5, "the clipping must bite"
    assert ("loss_scale" in pairs[0][0]) == (amp == "fp16")


def test_overflow_on_one_rank_skips_the_step_on_all(world2: KeptWorld, tmp_path: Path) -> None:
    """fp16: the last rank's gradients overflow in step 6; the loss itself is finite."""
    folder = tmp_path / "run"
    env = {"HVDTRAIN_TEST_OVERFLOW_STEP": "6"}
    train(world2, f"{EXACT}:Overflow", folder, "--steps", "9", "--amp", "fp16", "--log-every", "1", env=env)
    # The first steps find out the scale.
    assert [row["skipped"] for row in rows(folder)][3:] == [0, 0, 0, 1, 0, 0]
    scales = [row["loss_scale"] for row in rows(folder)]
    assert scales[7] == scales[6] / 2


@pytest.mark.parametrize("kind", ["horovodrun", *slow("mpirun")])
def test_a_loss_that_is_not_finite_ends_all_ranks_and_names_the_one(kind: str, tmp_path: Path) -> None:
    env = {"HVDTRAIN_TEST_NAN": "1:3"}
    done = run(kind, 2, [*HVDTRAIN, "train", f"{EXACT}:Overflow", "--run-dir", str(tmp_path / "run")], env=env)
    assert done.returncode == 1
    host = os.uname().nodename
    assert f"the loss is not finite at step 4 (epoch 1), on rank 1 on {host}; lower --lr" in done.stderr


def test_skip_nonfinite_skips_so_many_and_no_more(world2: KeptWorld, tmp_path: Path) -> None:
    env = {"HVDTRAIN_TEST_NAN": "1:3"}
    folder = tmp_path / "run"
    summary = train(
        world2,
        f"{EXACT}:Overflow",
        folder,
        "--steps",
        "6",
        "--skip-nonfinite",
        "1",
        "--log-every",
        "1",
        env=env,
    )
    assert summary["skipped_nonfinite"] == 1
    assert [row["loss"] is None for row in rows(folder)] == [False, False, False, True, False, False]
    assert all(math.isfinite(value) for value in summary["eval"].values())
