"""The JAX recipes that hvdtrain ships are trained for a short time, on one and on two ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.recipe.registry import load_recipe
from tests.ranks.harness import ROOT, rows
from tests.ranks.test_recipes_of_text import flags
from tests.support.pages import read_files, write_file
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, train

# 20 files of the standard library, and a network of one block.
SMALL_CHARLM = {"files": 20, "width": 64, "depth": 1, "heads": 2, "context": 32, "batch_size": 32, "lr": 5e-3}


@pytest.mark.slow
def test_charlm_jax_learns_the_same_on_1_and_2_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    """The last of its batches is padded: its loss is a mean over bytes, wherever they are."""
    options = ["--steps", "60", "--log-every", "1", *flags(SMALL_CHARLM)]
    one, two = (train(worlds[ranks], "charlm_jax", tmp_path / str(ranks), *options)["eval"] for ranks in (1, 2))
    losses = [[row["loss"] for row in rows(tmp_path / ranks)] for ranks in ("1", "2")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert two["bits_per_byte"] == pytest.approx(two["loss"] / math.log(2))
    # Better than to know how frequent each byte is in what is predicted.
    targets = load_recipe("charlm")(files=20, context=32).dataset("eval")[:, 1:].flatten()
    frequencies = targets[targets >= 0].bincount() / (targets >= 0).sum()
    entropy = -(frequencies * frequencies.clamp(min=1e-9).log2()).sum().item()
    assert two["bits_per_byte"] < entropy - 0.3


@pytest.mark.slow
def test_charlm_jax_learns_with_dropout_in_bf16(world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--steps", "60", "--amp", "bf16", "--dropout", "0.1", *flags(SMALL_CHARLM)]
    assert train(world2, "charlm_jax", tmp_path / "run", *options)["eval"]["bits_per_byte"] < 4.6


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes of docs/frameworks.md."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in read_files(ROOT / "docs" / "frameworks.md").items():
        write_file(name, text, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "least"),
    [("equinox_spiral", 0.9), ("probed_spiral", 0.6), *slow(("linen_spiral", 0.9), ("nnx_spiral", 0.65))],
)
def test_recipes_of_the_page_learn_on_two_ranks(
    name: str, least: float, world2: KeptWorld, page: Path, tmp_path: Path
) -> None:
    options = ["--epochs", "10", *(["--amp", "bf16"] if name == "linen_spiral" else [])]  # its loss is bf16, too
    summary = train(world2, str(page / f"{name}.py"), tmp_path / "run", *options, cwd=page)
    assert summary["eval"]["accuracy"] > least


def test_equinox_learns_the_same_on_one_rank(worlds: KeptWorlds, page: Path, tmp_path: Path) -> None:
    options = ["--epochs", "3", "--log-every", "1"]
    for ranks in (1, 2):
        train(worlds[ranks], str(page / "equinox_spiral.py"), tmp_path / str(ranks), *options, cwd=page)
    one, two = ([row["loss"] for row in rows(tmp_path / ranks)] for ranks in ("1", "2"))
    np.testing.assert_allclose(one, two, rtol=1e-5)
