"""The recipes of texts train for real, and their metrics are right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from hvdtrain.recipe.registry import load_recipe
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, KeptWorlds, train

# 20 files of the standard library, and a network of one block: without dropout, so that only rounding differs.
SMALL_CHARLM = {"files": 20, "width": 64, "depth": 1, "heads": 2, "context": 32, "batch_size": 32, "lr": 1e-2}


def flags(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def load_model(run_dir: Path, recipe: Any) -> torch.nn.Module:
    """The recipe's model with the weights at the end of a run."""
    (state,) = (run_dir / "checkpoints").glob("step-*/state")
    model = recipe.model()
    model.load_state_dict(torch.load(state, weights_only=True)["model"])
    return model.eval()


def batches(recipe: Any, size: int = 64) -> Iterator[Any]:
    """The batches of a recipe's evaluation."""
    examples = recipe.dataset("eval")
    for first in range(0, len(examples), size):
        yield recipe.collate([examples[i] for i in range(first, min(first + size, len(examples)))])


def test_charlm_learns_the_same_on_1_and_2_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    one, two = (
        train(worlds[ranks], "charlm", tmp_path / str(ranks), "--steps", "100", *flags(SMALL_CHARLM))["eval"]
        for ranks in (1, 2)
    )
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert two["bits_per_byte"] == pytest.approx(two["loss"] / math.log(2))
    # Better than to know how frequent each byte is in what is predicted.
    targets = torch.cat([batch[:, 1:].flatten() for batch in batches(load_recipe("charlm")(**SMALL_CHARLM))])
    frequencies = targets[targets >= 0].bincount() / (targets >= 0).sum()
    entropy = -(frequencies * frequencies.clamp(min=1e-9).log2()).sum().item()
    assert two["bits_per_byte"] < entropy - 0.3
    assert "bytes/s, MFU" in worlds[2].printed[0] and "MFU" not in worlds[2].printed[1]


@pytest.mark.slow
def test_charlm_compiled_learns_the_same(world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--steps", "10", *flags(SMALL_CHARLM)]
    plain = train(world2, "charlm", tmp_path / "plain", *options)["eval"]
    compiled = train(world2, "charlm", tmp_path / "compiled", *options, "--compile", timeout=110)["eval"]
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_textclass_knows_languages_and_its_f1_is_scikit_learns(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, "textclass", tmp_path / "run", "--steps", "150")
    recipe = load_recipe("textclass")()
    model = load_model(tmp_path / "run", recipe)
    with torch.no_grad():
        found = [(labels, model(names).argmax(1)) for names, labels in batches(recipe)]
    actual, predicted = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    f1 = f1_score(actual, predicted, average=None)
    np.testing.assert_allclose(summary["eval"]["f1"], f1, rtol=1e-12)
    assert summary["eval"]["macro_f1"] == pytest.approx(f1.mean(), rel=1e-12)
    assert summary["eval"]["macro_f1"] > 0.4  # 0.04 by chance
    assert rows(tmp_path / "run")[-1]["eval_macro_f1"] == summary["eval"]["macro_f1"]


def test_textclass_holds_out_names() -> None:
    recipe = load_recipe("textclass")()
    train_names, eval_names = ({name for name, _ in recipe.dataset(split)} for split in ("train", "eval"))
    assert len(train_names) > 3 * len(eval_names) > 0 and not train_names & eval_names
