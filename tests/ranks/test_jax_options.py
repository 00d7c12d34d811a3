"""JAX recipes with the options of `hvdtrain train` on real ranks: what holds for torch holds for them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hvdtrain
from hvdtrain.recipe.registry import load_recipe
from tests.ranks import harness
from tests.ranks.elastic import verify
from tests.ranks.harness import HVDTRAIN, ROOT, rows, run
from tests.ranks.test_deterministic import digest
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

DIGITS = str(ROOT / "recipes" / "digits_jax.py")
OWN = str(Path(__file__).parent / "jax_digits_recipes.py")
# 1,437 examples in batches of 128: the last has 29. One pass of the last batch is smaller than the others.
TWO_EPOCHS = ["--epochs", "2", "--log-every", "1", "--threads", "1"]
NUM_FUNCTIONS = 4  # score for training, its pullback, score for evaluation, the optimizer's update


def column(run_dir: Path, name: str) -> list[Any]:
    return [row[name] for row in rows(run_dir)]


def read_state(run_dir: Path, which: str = "best") -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run_dir / "checkpoints" / which / "state", weights_only=True)
    return state


@pytest.fixture(scope="module")
def alone(world1: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of digits_jax on one rank."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(world1, DIGITS, folder, *TWO_EPOCHS)
    return folder


def read_summary(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


# Losses.


@pytest.mark.parametrize("ranks", [2, *slow(3)])
def test_any_number_of_ranks_has_the_losses_of_one(ranks: int, worlds: KeptWorlds, alone: Path, tmp_path: Path) -> None:
    """With a loader's processes, and compared replicas, too; each function is compiled once for all batches' sizes."""
    options = [*TWO_EPOCHS, "--workers", "1", "--diagnose"]
    summary, expected = train(worlds[ranks], DIGITS, tmp_path / "run", *options), read_summary(alone)
    assert (summary["framework"], summary["world_size"], summary["samples_seen"]) == ("jax", ranks, 2 * 1437)
    found, losses_alone = column(tmp_path / "run", "loss"), column(alone, "loss")
    assert len(found) == 24
    assert found == pytest.approx(losses_alone, rel=1e-5)
    assert summary["eval"]["loss"] == pytest.approx(expected["eval"]["loss"], rel=1e-5)
    assert summary["eval"]["accuracy"] == expected["eval"]["accuracy"]
    assert summary["compilations"] == expected["compilations"] == NUM_FUNCTIONS
    verify(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "diagnose.json").read_text())["drift"] is None
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 25))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_digits_reaches_97_percent(ranks: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    assert train(worlds[ranks], DIGITS, tmp_path / "run", "--threads", "1")["eval"]["accuracy"] >= 0.97


@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-5), *slow(("bf16", 2e-2), ("fp16", 3e-3))])
def test_micro_batches_and_amp_on_two_ranks_equal_one(
    amp: str, tolerance: float, world1: KeptWorld, world2: KeptWorld, tmp_path: Path
) -> None:
    """Each rank of two takes 3 passes a step, the one alone takes 6: same micro-batches' size."""
    options = ["--steps", "14", "--log-every", "1", "--clip-norm", "0.5", "--micro-batch", "22", "--amp", amp]
    ones, twos = tmp_path / "alone", tmp_path / "ranks"
    train(world1, DIGITS, ones, *options, "--threads", "1")
    train(world2, DIGITS, twos, *options, "--threads", "1")
    pairs = list(zip(rows(ones), rows(twos), strict=True))
    for one, two in pairs:
        assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=5 * tolerance)
        assert one.get("loss_scale") == two.get("loss_scale")
    assert max(one["gradient_norm"] for one, _ in pairs) > 0.5, "the clipping must bite"
    assert ("loss_scale" in pairs[0][0]) == (amp == "fp16")
    if amp == "off":
        train(world1, DIGITS, tmp_path / "one pass", *options[:4], "--threads", "1", "--clip-norm", "0.5")
        assert column(ones, "loss") == pytest.approx(column(tmp_path / "one pass", "loss"), rel=1e-5)


def test_overflow_on_one_rank_skips_the_step_on_all(world1: KeptWorld, world2: KeptWorld, tmp_path: Path) -> None:
    """fp16: the gradient of one example is not finite, its loss is; the step is the same one on any number of ranks."""
    options = ["--amp", "fp16", "--log-every", "1", "--diagnose", "--threads", "1"]
    train(world1, f"{OWN}:Overflow", tmp_path / "one", *options)
    train(world2, f"{OWN}:Overflow", tmp_path / "two", *options)
    skipped, scales = column(tmp_path / "two", "skipped"), column(tmp_path / "two", "loss_scale")
    assert skipped == column(tmp_path / "one", "skipped")
    assert sum(skipped[11:]) == 1, "the odd example's step of the second epoch"
    odd = 11 + skipped[11:].index(1)
    assert scales[odd + 1 if odd < 21 else odd] == scales[odd - 1] / 2
    assert column(tmp_path / "two", "loss") == pytest.approx(column(tmp_path / "one", "loss"), rel=1e-2)
    assert json.loads((tmp_path / "two" / "diagnose.json").read_text())["drift"] is None
    assert all(p.isfinite().all() for p in read_state(tmp_path / "two")["model"].values())


def test_a_loss_that_is_not_finite_is_named_or_skipped(world2: KeptWorld, tmp_path: Path) -> None:
    env = {"HVDTRAIN_TEST_NAN": "1"}
    text = refusal(world2, f"{OWN}:Overflow", tmp_path / "run", env=env)
    assert text.startswith("the loss is not finite at step ") and "; lower --lr" in text
    options = ["--skip-nonfinite", "1", "--epochs", "1"]
    summary = train(world2, f"{OWN}:Overflow", tmp_path / "skips", *options, env=env)
    assert summary["skipped_nonfinite"] == 1
    assert math.isfinite(summary["train_loss"]) or summary["train_loss"] is None


# Compression.


@pytest.mark.parametrize(
    ("spec", "tolerance"),
    [
        ("int8,min=100", 0.05),
        ("powersgd:4,min=100,warmup=0", 4.0),
        *slow(
            ("fp16", 1e-2),
            ("bf16", 2e-2),
            ("qsgd:8bit,min=100", 0.1),
            ("topk:0.25,min=100,warmup=0", 1.0),
            ("randomk:0.5,min=100,warmup=0", 1.0),
            ("onebit,min=100", 1.0),
        ),
    ],
)
def test_compressed_gradients_train(
    spec: str, tolerance: float, world2: KeptWorld, alone: Path, tmp_path: Path
) -> None:
    summary = train(world2, DIGITS, tmp_path / "run", *TWO_EPOCHS, "--compression", spec, "--diagnose")
    dense, values = read_summary(alone), sum(bucket["values"] for bucket in summary["buckets"])
    assert summary["compression"] == spec
    assert summary["wire_bytes_per_step"] < 0.7 * 4 * values
    assert summary["eval"]["loss"] == pytest.approx(dense["eval"]["loss"], rel=tolerance)
    assert column(tmp_path / "run", "loss")[-1] < 0.7 * column(tmp_path / "run", "loss")[0]
    assert json.loads((tmp_path / "run" / "diagnose.json").read_text())["drift"] is None


@pytest.mark.slow
def test_auto_compression_trains_and_writes_its_advice(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, DIGITS, tmp_path / "run", "--compression", "auto,min=64", "--threads", "1")
    advice = json.loads((tmp_path / "run" / "advisor.json").read_text())
    assert [row["choice"] for row in advice["rows"] if set(row["choice"]) == {"none"}]
    assert (summary["compression"], summary["eval"]["accuracy"] > 0.95) == ("auto,min=64", True)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_horovods_own_exchange_trains_alike(compression: str, world2: KeptWorld, alone: Path, tmp_path: Path) -> None:
    options = [*TWO_EPOCHS, "--exchange", "horovod", "--micro-batch", "22", "--compression", compression]
    train(world2, DIGITS, tmp_path / "run", *options)
    tolerance = 1e-5 if compression == "none" else 1e-2
    assert column(tmp_path / "run", "loss") == pytest.approx(column(alone, "loss"), rel=tolerance)


# The other options.


def evaluate_here(folder: Path, which: str) -> dict[str, Any]:
    from hvdtrain.training.evaluating import evaluate_run

    return asdict(evaluate_run(folder, which, None, {"threads": 1}, hvdtrain.init()))


def test_the_average_of_the_weights_is_evaluated(world2: KeptWorld, tmp_path: Path) -> None:
    """Against the average of the weights of every step, from a checkpoint of each; `hvdtrain evaluate` agrees."""
    options = ["--steps", "12", "--checkpoint-every", "1", "--keep", "20", "--ema", "0.8", "--batch-size", "7"]
    summary = train(world2, f"{OWN}:Least", tmp_path / "run", *options)
    average: dict[str, torch.Tensor] = {}
    for step in range(1, 13):
        state = read_state(tmp_path / "run", f"step-{step}")
        for name, value in state["model"].items():
            average[name] = value if step == 1 else 0.8 * average[name] + 0.2 * value
    for name, value in average.items():
        torch.testing.assert_close(state["ema"][f"module.{name}"], value)
    report = world2.run(evaluate_here, tmp_path / "run", "last")[0]
    assert report["metrics"]["eval"] == summary["eval"]
    x, y, _ = (np.stack(values) for values in zip(*load_recipe(f"{OWN}:Least")().dataset("eval"), strict=True))
    errors = torch.from_numpy(x) @ average["slope"] + average["offset"] - torch.from_numpy(y)
    expected = errors.square().mean()
    assert summary["eval"]["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_running_means_are_means_over_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    """Batches keep their sizes, as the score mixes examples; the plan says so."""
    summary = train(worlds[2], f"{OWN}:Norm", tmp_path / "run", "--batch-size", "12", "--ema", "0.9")
    assert "score mixes examples" in worlds[2].printed[0]
    # Batches of 12 and 1, halved, and evaluations of 6 and of what is left: 2 sizes of each, at most.
    assert summary["compilations"] <= 2 * NUM_FUNCTIONS
    state = read_state(tmp_path / "run")["model"]
    assert state["batch_stats.batches"] == 12 and state["batch_stats.mean"].abs().max() > 0
    train(worlds[2], f"{OWN}:Norm", tmp_path / "more", "--batch-size", "12", "--steps", "7", "--ema", "0.9")
    resumed = train(worlds[2], f"{OWN}:Norm", tmp_path / "more", "--resume", "--epochs", "2")
    assert resumed["resumed_from"] == 7
    assert digest(tmp_path / "more") == digest(tmp_path / "run")
    text = refusal(worlds[2], f"{OWN}:Norm", tmp_path / "bits", "--deterministic")
    assert text.startswith("--deterministic: training changes the buffer 'batch_stats.batches' ")


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(world2: KeptWorld, alone: Path, tmp_path: Path) -> None:
    options = ["--steps", "1", "--lr", "0", "--init-from", str(alone / "checkpoints" / "best")]
    summary = train(world2, DIGITS, tmp_path / "all", *options, "--seed", "5", "--threads", "1")
    assert summary["eval"] == pytest.approx(read_summary(alone)["eval"], rel=1e-6)
    text = refusal(world2, DIGITS, tmp_path / "refused", *options, "--width", "16")
    assert "does not fit the model" in text and "'conv1.kernel'" in text
    train(world2, DIGITS, tmp_path / "part", *options, "--width", "16", "--init-partial")
    found, given = read_state(tmp_path / "part"), read_state(alone)
    assert torch.equal(found["model"]["out.bias"], given["model"]["out.bias"])


def test_patience_ends_the_training_and_the_best_checkpoint_stays(world2: KeptWorld, tmp_path: Path) -> None:
    """With a learning rate of 0 no evaluation is better than the first."""
    options = ["--lr", "0", "--eval-every", "1", "--checkpoint-every", "1", "--keep", "1", "--patience", "2"]
    summary = train(world2, DIGITS, tmp_path / "run", *options)
    assert (summary["steps"], summary["finished"], summary["best"]["step"]) == (3, True, 1)
    assert summary["ended"] == "2 evaluations without a better accuracy (--patience)"
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best").resolve().name == "step-1"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-1", "step-3"]


@pytest.mark.slow
def test_weak_scaling_is_the_larger_batch_at_the_scaled_rate(
    world1: KeptWorld, world3: KeptWorld, tmp_path: Path
) -> None:
    common = ["--steps", "8", "--log-every", "1"]
    train(world3, f"{OWN}:Least", tmp_path / "weak", "--batch-per-rank", "4", "--scale-lr", "linear", *common)
    train(world1, f"{OWN}:Least", tmp_path / "strong", "--batch-size", "12", "--lr", "0.03", *common)
    assert column(tmp_path / "weak", "loss") == pytest.approx(column(tmp_path / "strong", "loss"), rel=1e-5)
    assert column(tmp_path / "weak", "lr") == pytest.approx(column(tmp_path / "strong", "lr"))


@pytest.mark.parametrize("option", ["--compile", "--sync-batchnorm", "--shard optimizer"])
def test_what_is_for_torch_only_is_refused_by_name(option: str, world1: KeptWorld, tmp_path: Path) -> None:
    text = refusal(world1, DIGITS, tmp_path / "run", *option.split())
    assert text.startswith(f"{option} is for torch, and ") and "\n" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_options_are_printed_and_read_again(tmp_path: Path) -> None:
    done = run("alone", 1, [*HVDTRAIN, "train", DIGITS, "--width", "8", "--amp", "bf16", "--print-config"])
    options = json.loads(done.stdout)
    assert (options["recipe"]["width"], options["run"]["amp"]) == (8, "bf16")
    (tmp_path / "options.json").write_text(done.stdout)
    summary = harness.train(
        "alone", 1, DIGITS, tmp_path / "run", "--config", str(tmp_path / "options.json"), "--steps", "2"
    )
    assert summary["steps"] == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["width"] == 8
