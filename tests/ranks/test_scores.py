"""Scores that are sums of pairs and vectors, and the metrics that are computed of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from sklearn import metrics as judge
from torch import nn

from hvdtrain.recipe import order
from tests.ranks import score_recipes
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, KeptWorlds, on_ranks, refusal, train

FILE = Path(score_recipes.__file__)
TOKENS = f"{FILE}:Tokens"
EVERY_STEP = ("--log-every", "1", "--eval-every", "100")


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    weights: dict[str, torch.Tensor] = torch.load(newest / "state", weights_only=True)["model"]
    return weights


def reference(clip: float | None = None, **fields: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A plain float64 loop over whole batches, on one process: the weights, and the loss of each step."""
    recipe = score_recipes.Tokens(**fields)
    model, data = recipe.model(), recipe.dataset("train")
    optimizer, losses = recipe.optimizer(model.parameters()), []
    for ids in order.iterate_batches(len(data), recipe.batch_size, 0, 0):
        tokens, lengths = recipe.collate([data[i] for i in ids])
        nll, _, weights = score_recipes.token_scores(model, tokens, lengths, recipe.weighted)
        losses.append(float(nll.detach().sum() / weights.sum()) if weights.sum() else 0.0)
        if weights.sum():
            optimizer.zero_grad()
            (nll.sum() / weights.sum()).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model.state_dict(), losses


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


WAYS = [
    (1, "--micro-batch 8"),
    (1, "--micro-batch 3"),
    (2, "--micro-batch 1"),
    (2, "--clip-norm 0.1 --weighted"),
    (3, "--micro-batch 2"),
    (4, "--deterministic --virtual-shards 4 --weighted"),
]


@pytest.mark.parametrize(("ranks", "options"), WAYS, ids=[f"{ranks} {options}" for ranks, options in WAYS])
def test_a_mean_over_tokens_is_that_of_the_whole_batch(
    ranks: int, options: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    check_token_mean(worlds[ranks], options, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("weighted", ["", " --weighted"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_mean_over_tokens_is_that_of_the_whole_batch_in_all_ways(
    ranks: int, micro_batch: int, weighted: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    check_token_mean(worlds[ranks], f"--micro-batch {micro_batch}{weighted}", tmp_path / "run")


def check_token_mean(world: KeptWorld, options: str, folder: Path) -> None:
    clip = 0.1 if "--clip-norm" in options else None
    weights, losses = reference(clip, weighted="--weighted" in options)
    train(world, TOKENS, folder, *EVERY_STEP, *options.split())
    assert largest_difference(final_weights(folder), weights) <= 1e-12
    found = rows(folder)
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-12)
    assert [row["perplexity"] for row in found] == pytest.approx(np.exp(losses).tolist(), rel=1e-12)


def test_deterministic_weights_of_fractional_denominators_have_the_same_bits(
    worlds: KeptWorlds, tmp_path: Path
) -> None:
    options = (*EVERY_STEP, "--deterministic", "--virtual-shards", "5", "--weighted", "--micro-batch", "1")
    for ranks in (1, 2, 3):
        train(worlds[ranks], TOKENS, tmp_path / str(ranks), *options)
    first = final_weights(tmp_path / "1")
    for ranks in (2, 3):
        assert all(torch.equal(first[name], value) for name, value in final_weights(tmp_path / str(ranks)).items())


def test_gradients_in_half_precision_are_rescaled_after_they_are_unscaled(world2: KeptWorld, tmp_path: Path) -> None:
    """Autocast leaves float64 alone, so the scaler's path must give the numbers of the plain loop."""
    train(world2, TOKENS, tmp_path / "run", *EVERY_STEP, "--amp", "fp16", "--clip-norm", "0.1")
    assert {row["skipped"] for row in rows(tmp_path / "run")} == {0.0}
    assert largest_difference(final_weights(tmp_path / "run"), reference(0.1)[0]) <= 1e-9


def test_a_step_without_a_token_changes_nothing_and_is_counted(world2: KeptWorld, tmp_path: Path) -> None:
    """One example a step on two ranks: those without a token are steps whose denominators add up to 0."""
    summary = train(world2, TOKENS, tmp_path / "run", *EVERY_STEP, "--batch-size", "1", "--empty-from", "40")
    weights, losses = reference(batch_size=1, empty_from=40)
    found, empty = rows(tmp_path / "run"), losses.count(0.0)
    assert 21 <= empty < 61
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-12)
    assert [row.get("skipped", 0.0) for row in found] == [float(loss == 0) for loss in losses]
    assert (summary["skipped"], summary["skipped_nonfinite"], summary["finished"]) == (empty, 0, True)
    assert math.isfinite(summary["train_loss"])
    assert largest_difference(final_weights(tmp_path / "run"), weights) <= 1e-12
    assert world2.printed[0].count("the denominators of the loss add up to 0") == 1


def test_an_evaluation_without_a_token_is_null_and_never_the_best(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, TOKENS, tmp_path / "run", *EVERY_STEP, "--empty-from", "0", "--steps", "2")
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["eval"] == {"loss": None, "accuracy": None, "perplexity": None, "bits": None}
    assert (written["best"], summary["skipped"], summary["train_loss"]) == (None, 2, 0.0)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("three", "'loss' is a tuple of 3; expected one value per example, or a pair (numerators, denominators)"),
        ("shape", "the denominators of 'loss' should have shape (2,) for 2 examples, got shape ()"),
        ("number", "the denominators of 'loss' should have shape (2,) for 2 examples, got float"),
        ("vector", "'loss' should have shape (2,) for 2 examples, got shape (2, 1)"),
        ("vector loss", "'loss' should have shape (2,) for 2 examples, got shape (2, 2)"),
        ("wide denominators", "the denominators of 'hits' should have shape (2,) for 2 examples, got shape (2, 2)"),
        ("complex", "'hits' should be real, got complex128"),
        ("negative", "a denominator of 'loss' is negative; expected weights of 0 or more, such as numbers of tokens"),
        ("negative later", "a denominator of 'loss' is negative"),
        ("pair later", "must always return the same scores: 'accuracy' was a pair first and is no pair now"),
        ("width", "'hits' should have shape (4, 2) for 4 examples, got shape (4, 3)"),
        ("reserved", "'lr' is a column of metrics.jsonl; rename it"),
    ],
)
def test_scores_are_refused_by_name(what: str, text: str, world2: KeptWorld, tmp_path: Path) -> None:
    found = refusal(world2, f"{FILE}:Spoiled", tmp_path / "run", env={"HVDTRAIN_TEST_SPOIL": what})
    assert found.startswith("Spoiled.score")
    assert text in found


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("raises", "Wrong.metrics() raised ValueError: no such thing"),
        ("none", "Wrong.metrics() returned NoneType; expected a dict of numbers and vectors: does it lack a return?"),
        ("list", "Wrong.metrics() returned list; expected a dict of numbers and vectors"),
        ("text", "Wrong.metrics(): 'f1' is 'high'; expected a number or a vector of numbers, (k,)"),
        ("matrix", "Wrong.metrics(): 'f1' is an array of shape (2, 2); expected a number or a vector of numbers, (k,)"),
        ("taken", "Wrong.metrics(): 'epoch' is a column of metrics.jsonl; rename it"),
    ],
)
def test_metrics_are_refused_by_name_before_the_first_step(
    what: str, text: str, world2: KeptWorld, tmp_path: Path
) -> None:
    assert refusal(world2, f"{FILE}:Wrong", tmp_path / "run", env={"HVDTRAIN_TEST_SPOIL": what}) == text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ranks", "options"), [(1, []), (2, ["--micro-batch", "7"])])
def test_metrics_of_counts_are_those_of_scikit_learn(
    ranks: int, options: list[str], worlds: KeptWorlds, tmp_path: Path
) -> None:
    summary = train(worlds[ranks], f"{FILE}:Judged", tmp_path / "run", *options)
    recipe = score_recipes.Judged()
    model = recipe.model()
    model.load_state_dict(final_weights(tmp_path / "run"))
    inputs, targets = map(torch.stack, zip(*recipe.dataset("eval"), strict=True))
    logits = model(inputs).detach()
    predicted, found = logits.argmax(1), summary["eval"]
    assert found["f1"] == pytest.approx(judge.f1_score(targets, predicted, average="macro"), rel=1e-12)
    binned = score_recipes.bin_numbers(logits)
    assert found["auc"] == pytest.approx(judge.roc_auc_score(targets == 2, binned), rel=1e-12)
    assert found["recall"] == pytest.approx(judge.recall_score(targets, predicted, average=None).tolist(), rel=1e-12)
    cells = np.asarray(found["cells"]).reshape(3, 3) * len(targets)
    assert cells == pytest.approx(judge.confusion_matrix(targets, predicted), rel=1e-12)
    assert summary["best"].keys() == {"step", "metric", "value"} and summary["best"]["metric"] == "f1"

    last = rows(tmp_path / "run")[-1]
    assert last["eval_f1"] == found["f1"] and last["eval_cells"] == found["cells"] and len(last["cells"]) == 9
    assert last["undefined"] is None and last["eval_undefined"] is None
    printed = worlds[ranks].printed[0]
    assert "eval loss" in printed and "auc 0." in printed and "cells" not in printed


def test_bleu_of_ngram_counts_is_that_of_sacrebleu(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, f"{FILE}:Translated", tmp_path / "run", "--epochs", "4", "--micro-batch", "3")
    recipe = score_recipes.Translated()
    model = recipe.model()
    model.load_state_dict(final_weights(tmp_path / "run"))
    with torch.no_grad():
        pairs = list(score_recipes.hypotheses(model, *recipe.collate(recipe.dataset("eval"))))
    said, comes = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    expected = sacrebleu.corpus_bleu(said, [comes], tokenize="none", smooth_method="none").score
    assert summary["eval"]["bleu"] == pytest.approx(expected, rel=1e-12) and expected > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [("recall", "'recall' has 3 values; expected one number"), ("f2", "there is no metric 'f2'; there are: f1, ")],
)
def test_best_may_name_what_metrics_returns(value: str, text: str) -> None:
    from hvdtrain.system.errors import UserError
    from hvdtrain.training.start import check_metric_names

    class Named(score_recipes.Judged):
        best = (value, "max")

    with pytest.raises(UserError, match=r"Named\.best: ") as raised:
        check_metric_names(Named(), ["eval"], {"loss": 1.0, "f1": 0.5, "recall": [1.0, 0.5, 0.25]})
    assert text in str(raised.value)


def test_rows_are_exact_sums_since_the_last_row_also_through_a_resume(world2: KeptWorld, tmp_path: Path) -> None:
    options = ("--log-every", "3", "--eval-every", "5", "--checkpoint-every", "4", "--keep", "9", "--epochs", "2")
    train(world2, TOKENS, tmp_path / "run", *options)
    whole = [without_times(row) for row in rows(tmp_path / "run")]
    each_step = (*EVERY_STEP, "--epochs", "2")
    train(world2, TOKENS, tmp_path / "steps", *each_step)
    steps, before = rows(tmp_path / "steps"), 0
    tokens = step_tokens(epochs=2)
    for row in whole:
        since = range(before, row["step"])
        mean = sum(steps[i]["loss"] * tokens[i] for i in since) / sum(tokens[i] for i in since)
        assert row["loss"] == pytest.approx(mean, rel=1e-12)
        before = row["step"]

    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > 4:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    summary = train(world2, TOKENS, tmp_path / "run", "--resume")
    assert summary["resumed_from"] == 4
    assert [without_times(row) for row in rows(tmp_path / "run")] == whole


def step_tokens(epochs: int) -> list[int]:
    recipe = score_recipes.Tokens()
    data = recipe.dataset("train")
    batches = [ids for epoch in range(epochs) for ids in order.iterate_batches(len(data), recipe.batch_size, 0, epoch)]
    return [sum(len(data[i]) - 1 for i in ids) for ids in batches]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("samples_per_second", "comm_seconds")}


@pytest.mark.parametrize(
    ("ranks", "options"), [(1, []), (2, ["--micro-batch", "7"]), (3, ["--from-score", "--batch-size", "64"])]
)
def test_summarise_gets_all_outputs_in_the_order_of_ids(
    ranks: int, options: list[str], worlds: KeptWorlds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = train(worlds[ranks], f"{FILE}:Summarised", tmp_path / "run", *options)
    recipe = score_recipes.Judged()
    model = recipe.model()
    model.load_state_dict(final_weights(tmp_path / "run"))
    inputs, targets = map(torch.stack, zip(*recipe.dataset("eval"), strict=True))
    logits, found = model(inputs).detach(), summary["eval"]
    expected = judge.roc_auc_score(targets == 2, logits.softmax(1)[:, 2])
    assert found["exact_auc"] == pytest.approx(expected, rel=1e-12)
    assert found["matrix"] == judge.confusion_matrix(targets, logits.argmax(1)).ravel().tolist()
    assert found["in_order"] == 1.0
    assert summary["best"]["metric"] == "exact_auc" and summary["best"]["value"] >= found["exact_auc"]
    assert rows(tmp_path / "run")[-1]["eval_exact_auc"] == found["exact_auc"]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        ("kind", "Summarised: the output 'logits' is (B, 3) float64 and (B, 3) float32 for "),
        ("rows", "Summarised.outputs(): 'logits' is shape (1, 3) float64 for 2 examples; expected an array (B, ...)"),
        ("list", "Summarised.outputs(): 'target' is list for 2 examples; expected an array (B, ...) of numbers"),
    ],
)
def test_outputs_are_refused_by_name(spoil: str, text: str, world2: KeptWorld, tmp_path: Path) -> None:
    assert text in refusal(world2, f"{FILE}:Summarised", tmp_path / "run", "--spoil", spoil, "--micro-batch", "32")


def test_summarise_without_outputs_is_refused(world2: KeptWorld, tmp_path: Path) -> None:
    assert refusal(world2, f"{FILE}:Unsummarised", tmp_path / "run") == (
        "Unsummarised.summarise has no outputs to summarise: write Unsummarised.outputs(self, model, batch), or return "
        "a pair of dicts (scores, outputs) from score"
    )


@on_ranks(2, 3)
def test_large_outputs_are_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdtrain.comm import collectives
    from hvdtrain.training import outputs

    monkeypatch.setattr(outputs, "PIECE_BYTES", 100)
    collector, rank = outputs.OutputCollector(score_recipes.Summarised()), collectives.rank()
    everything = np.random.default_rng(0).normal(size=(17, 2, 3))
    if rank < 2:  # a third rank has no example
        for ids in (np.arange(rank, 9, 2), np.arange(9 + rank, 17, 2)):
            collector.add_batch(ids, {"x": everything[ids], "empty": np.zeros((len(ids), 0))})
    found = collector.gather(17)
    if rank == 0:
        assert np.array_equal(found["x"], everything) and found["empty"].shape == (17, 0)
    else:
        assert len(found["x"]) == 0
