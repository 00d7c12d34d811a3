"""Promise 1: the same maths on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hvdtrain.recipe import order
from tests.ranks import harness
from tests.ranks.harness import ROOT, rows
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, train

DIGITS = str(ROOT / "recipes" / "digits.py")
EXACT = f"{Path(__file__).parent / 'exact_recipe.py'}:Exact"


@pytest.fixture(scope="module")
def alone(world1: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """digits in a single process: the rows of every step."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    summary = train(world1, DIGITS, folder, "--log-every", "1", "--threads", "1")
    assert summary["eval"]["accuracy"] >= 0.97
    return rows(folder)


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("kept", 2),
        *slow(("kept", 3), ("kept", 4), ("horovodrun-mpi", 2), ("horovodrun", 2), ("mpirun", 2)),
    ],
)
def test_digits_is_the_same_on_any_number_of_ranks(
    kind: str, ranks: int, worlds: KeptWorlds, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    options = ["--log-every", "1", "--threads", "1"]
    if kind == "kept":
        summary = train(worlds[ranks], DIGITS, tmp_path / "run", *options)
    else:
        summary = harness.train(kind, ranks, DIGITS, tmp_path / "run", *options)
    assert summary["world_size"] == ranks
    assert summary["samples_seen"] == 20 * 1437
    assert summary["eval"]["accuracy"] >= 0.97
    two_epochs = [(row, other) for row, other in zip(alone, rows(tmp_path / "run"), strict=True) if row["epoch"] <= 2]
    assert len(two_epochs) == 24
    for row, other in two_epochs:
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["samples"] == row["samples"]


def reference(epochs: int) -> tuple[list[float], dict[str, float]]:
    """Plain float64 gradient descent on the recipe of exact_recipe.py: losses of all steps, final metrics."""
    from tests.ranks.exact_recipe import EVAL, TRAIN, Exact

    recipe = Exact(epochs=epochs)
    weights = recipe.initial().numpy().copy()
    inputs, targets = TRAIN[0].numpy(), TRAIN[1].numpy()
    velocity = np.zeros_like(weights)
    losses = []
    for epoch in range(epochs):
        for ids in order.iterate_batches(len(inputs), recipe.batch_size, 0, epoch):
            x, y = inputs[ids], targets[ids]
            errors = x @ weights - y
            losses.append(float(np.mean(errors**2)))
            velocity = 0.9 * velocity + 2 * x.T @ errors / len(ids)
            weights = weights - recipe.lr * velocity
    errors = EVAL[0].numpy() @ weights - EVAL[1].numpy()
    return losses, {"loss": float(np.mean(errors**2)), "within": float(np.mean(np.abs(errors) < 0.1))}


@pytest.mark.parametrize(("ranks", "options"), [(1, []), (3, []), (3, ["--micro-batch", "2"])])
def test_ragged_batches_equal_a_float64_reference(
    ranks: int, options: list[str], worlds: KeptWorlds, tmp_path: Path
) -> None:
    """1,003 examples in batches of 7 on 3 ranks: the last batch has 2 examples, so a rank has none."""
    summary = train(worlds[ranks], EXACT, tmp_path / "run", "--epochs", "2", "--log-every", "1", *options)
    losses, metrics = reference(2)
    found = [row["loss"] for row in rows(tmp_path / "run")]
    assert len(found) == 2 * 144
    assert found == pytest.approx(losses, rel=1e-6)
    assert summary["eval"] == pytest.approx(metrics, rel=1e-6)
    epoch_mean = sum(loss * count for loss, count in zip(losses[144:], [7] * 143 + [2], strict=True)) / 1003
    assert summary["train_loss"] == pytest.approx(epoch_mean, rel=1e-6)


def test_dropout_and_batch_norm_agree_over_ranks_and_repeat(world3: KeptWorld, tmp_path: Path) -> None:
    """Randomness and running statistics: ranks end with one state, and a second run gives the same one."""
    states = []
    for name in ("first", "second"):
        folder = tmp_path / name
        recipe = f"{Path(__file__).parent / 'exact_recipe.py'}:Noisy"
        train(world3, recipe, folder, "--epochs", "1", env={"HVDTRAIN_TEST_OUT": str(folder)})
        per_rank = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(3)]
        for other in per_rank[1:]:
            assert other.keys() == per_rank[0].keys()
            for key, value in other.items():
                assert torch.equal(value, per_rank[0][key]), key
        states.append(per_rank[0])
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    assert states[0]["1.num_batches_tracked"] > 100
