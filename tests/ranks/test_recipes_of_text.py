"""The recipes of texts train for real, and their metrics are those that scikit-learn and sacrebleu compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU
from sklearn.metrics import f1_score

import hvdtrain
from hvdtrain.recipe.registry import load_recipe
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, KeptWorlds, train

# 20 files of the standard library, and a network of one block: without dropout, so that only rounding differs.
SMALL_CHARLM = {"files": 20, "width": 64, "depth": 1, "heads": 2, "context": 32, "batch_size": 32, "lr": 1e-2}
SMALL_TRANSLATE = {"width": 32, "layers": 1, "beams": 2, "batch_size": 64, "lr": 5e-3}


def flags(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


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
@pytest.mark.timeout(300)
def test_charlm_compiled_learns_the_same(world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--steps", "10", *flags(SMALL_CHARLM)]
    plain = train(world2, "charlm", tmp_path / "plain", *options)["eval"]
    compiled = train(world2, "charlm", tmp_path / "compiled", *options, "--compile", timeout=250)["eval"]
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_textclass_knows_languages_and_its_f1_is_scikit_learns(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, "textclass", tmp_path / "run", "--steps", "150")
    recipe, model = hvdtrain.load(tmp_path / "run", "last")
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


def test_translate_learns_and_its_bleu_is_sacrebleus(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(
        world2, "translate", tmp_path / "run", "--steps", "80", "--eval-every", "80", *flags(SMALL_TRANSLATE)
    )
    assert summary["eval"]["byte_accuracy"] > 0.25  # 0.1: the most frequent byte
    recipe, model = hvdtrain.load(tmp_path / "run", "last")
    with torch.no_grad():
        found = torch.cat([recipe.outputs(model, batch)["translations"] for batch in batches(recipe)]).tolist()
    translations = [bytes(byte for byte in row if byte > 2).decode(errors="replace") for row in found]
    references = [translation for _, translation in recipe.dataset("eval")]
    expected = BLEU(tokenize="char").corpus_score(translations, [references]).score
    assert summary["eval"]["bleu"] == pytest.approx(expected, rel=0.02)  # batches are others: a beam may be, too


def test_a_search_with_one_beam_takes_the_likeliest_bytes_whatever_the_padding() -> None:
    recipe = load_recipe("translate")(**{**SMALL_TRANSLATE, "beams": 1})
    torch.manual_seed(1)
    model = recipe.model().double().eval()
    examples = recipe.dataset("eval")[:3]
    with torch.no_grad():
        found = recipe.outputs(model, recipe.collate(examples))["translations"].tolist()
        for example, row in zip(examples, found, strict=True):
            source, _ = recipe.collate([example])
            tokens = [1]
            while tokens[-1] not in (0, 2) and len(tokens) < len(row):
                tokens.append(int(model(source, torch.tensor([tokens]))[0, -1].argmax()))
            assert row == tokens + [0] * (len(row) - len(tokens))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_translate_beats_copied_words(world2: KeptWorld, tmp_path: Path) -> None:
    """More than BLEU of the English names themselves, held out by their codes, after less than its usual training."""
    summary = train(world2, "translate", tmp_path / "run", "--epochs", "12", "--eval-every", "600", timeout=2500)
    names, references = zip(*load_recipe("translate")().dataset("eval"), strict=True)
    copied = BLEU(tokenize="char").corpus_score(names, [references]).score
    assert summary["eval"]["bleu"] > copied + 2
