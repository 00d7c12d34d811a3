"""Run options that no other test is about: weak scaling, EMA, compile, reports, threads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvdtrain.recipe.framework import NUM_VOTES
from tests.ranks import harness
from tests.ranks.harness import HVDTRAIN, ROOT, rows, run
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

DIGITS = str(ROOT / "recipes" / "digits.py")
EXACT = f"{Path(__file__).parent / 'exact_recipe.py'}:Exact"


@pytest.mark.parametrize(("scale", "factor"), [("none", 1.0), ("linear", 3.0), ("sqrt", 3**0.5)])
def test_weak_scaling_is_the_larger_batch_at_the_scaled_rate(
    scale: str, factor: float, world1: KeptWorld, world3: KeptWorld, tmp_path: Path
) -> None:
    weak = ["--batch-per-rank", "7", "--scale-lr", scale, "--steps", "20", "--log-every", "1"]
    train(world3, EXACT, tmp_path / "weak", *weak)
    assert "batch     21 global (7 x 3 ranks) = 3 ranks x 1 pass x at most 7" in world3.printed[0]
    assert (f"(times {factor:g}, --scale-lr {scale})" in world3.printed[0]) == (scale != "none")
    strong = ["--batch-size", "21", "--lr", str(0.003 * factor), "--steps", "20", "--log-every", "1"]
    train(world1, EXACT, tmp_path / "strong", *strong)
    found, expected = ([[row["loss"], row["lr"]] for row in rows(tmp_path / name)] for name in ("weak", "strong"))
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


def test_ema_averages_the_weights_and_is_what_is_evaluated(world2: KeptWorld, tmp_path: Path) -> None:
    """Against the average of the weights of every step, from a checkpoint of each."""
    options = ["--steps", "12", "--checkpoint-every", "1", "--keep", "20", "--ema", "0.8"]
    summary = train(world2, EXACT, tmp_path / "run", *options)
    average = None
    for step in range(1, 13):
        state = torch.load(tmp_path / "run" / "checkpoints" / f"step-{step}" / "state", weights_only=True)
        weight = state["model"]["weight"]
        average = weight.clone() if average is None else 0.8 * average + 0.2 * weight
    assert average is not None
    torch.testing.assert_close(state["ema"]["module.weight"], average)
    from tests.ranks.exact_recipe import EVAL

    errors = EVAL[0] @ average[0] - EVAL[1]
    assert summary["eval"]["loss"] == pytest.approx(float(errors.square().mean()), rel=1e-9)


@pytest.mark.timeout(240)
def test_compile_trains_alike(world1: KeptWorld, tmp_path: Path) -> None:
    options = ["--steps", "4", "--log-every", "1", "--batch-size", "64", "--eval-every", "100"]
    train(world1, DIGITS, tmp_path / "eager", *options)
    harness.train("alone", 1, DIGITS, tmp_path / "compiled", *options, "--compile", timeout=200)
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_run_folder_holds_what_it_promises(world2: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = train(world2, DIGITS, folder, "--epochs", "2", "--width", "8", "--log-every", "5")
    config = json.loads((folder / "config.json").read_text())
    assert (config["name"], config["class"], config["framework"]) == ("digits", "Digits", "torch")
    assert {"width": 8, "epochs": 2, "batch_size": 128}.items() <= config["recipe"].items()
    assert {"seed": 0, "amp": "off", "logger": ["tensorboard"]}.items() <= config["run"].items()

    logged = rows(folder)
    assert [row["step"] for row in logged] == [5, 10, 12, 15, 20, 24]
    needed = {"step", "epoch", "samples", "loss", "lr", "samples_per_second", "comm_seconds", "accuracy"}
    assert all(needed <= row.keys() for row in logged)
    assert all(row["comm_seconds"] > 0 for row in logged)
    assert logged[-1]["eval_accuracy"] == summary["eval"]["accuracy"]

    # 8 kB of gradients and flags, a number by which ranks in different steps are seen, sums and no buffers, whether 3
    # things have changed in the model, a loss is not finite and a denominator is negative; a rank of two sends half of
    # each twice.
    sizes = [8 * 1 * 9, 8, 16 * 8 * 9, 16, 10 * 64, 10]
    assert summary["wire_bytes_per_step"] == 4 * (sum(sizes) + len(sizes) + 2) + 8 * (2 + NUM_VOTES + 3 + 2)
    assert summary["compression"] == "none"
    assert summary["resumed_from"] is None
    assert summary["versions"]["horovod"].startswith("0.28.1+hvdtrain.")
    assert 0 < summary["comm_seconds_median"] < summary["step_seconds_median"]

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 12, 15, 20, 24]
    assert events.Scalars("eval/accuracy")[-1].value == pytest.approx(summary["eval"]["accuracy"])
    assert any("Conv" in node.op or "conv" in node.name.lower() for node in events.Graph().node)


def test_a_folder_with_a_run_is_not_overwritten(worlds: KeptWorlds, tmp_path: Path) -> None:
    train(worlds[1], EXACT, tmp_path / "run", "--steps", "2")
    for ranks in (1, 2):
        text = refusal(worlds[ranks], EXACT, tmp_path / "run", "--steps", "2")
        expected = "already holds a run: add --resume to continue it, or choose another --run-dir"
        assert text == f"run folder {tmp_path / 'run'} {expected}"


@pytest.mark.slow
def test_threads_divide_the_cores_among_the_ranks(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    for kind, ranks in (("alone", 1), ("horovodrun", 2), ("mpirun", 2)):
        env = {"HVDTRAIN_TEST_THREADS": "1", "OMP_NUM_THREADS": ""}
        recipe = EXACT.replace("Exact", "TellThreads")
        command = [*HVDTRAIN, "train", recipe, "--run-dir", str(tmp_path / f"{kind}{ranks}"), "--steps", "1"]
        done = run(kind, ranks, command, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"threads {max(1, cores // ranks)}.") == ranks
