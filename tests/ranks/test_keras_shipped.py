"""The Keras recipes that hvdtrain ships are trained for a short time, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("keras_worlds", ["jax", "tensorflow", "torch"], indirect=True),
]


def test_textclass_keras_learns_on_two_ranks(keras_world: KeptWorld, tmp_path: Path) -> None:
    summary = train(keras_world, "textclass_keras", tmp_path / "run", "--steps", "40", timeout=200)
    assert summary["eval"]["macro_f1"] > 0.15  # 0.04 by chance


@pytest.mark.timeout(240)  # compiling its steps takes most of it
def test_cifar10_keras_learns_made_examples_on_two_ranks(keras_world: KeptWorld, tmp_path: Path) -> None:
    options = ["--synthetic", "400", "--depth", "8", "--batch-size", "50", "--epochs", "3", "--log-every", "1"]
    train(keras_world, "cifar10_keras", tmp_path / "run", *options, timeout=200)
    found = rows(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"] - 0.3
    assert all(row["regularization"] > 0 for row in found)
