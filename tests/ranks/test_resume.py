"""Stopping, resuming, and checkpoints that are not what they should be."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import harness
from tests.ranks.disk import small_disk
from tests.ranks.harness import HVDTRAIN, ROOT, Job, launcher, rows, run, wait_for_step
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

# Dropout, AdamW's moments, EMA, a loss scale and batch norm all have state that a resume must bring back.
RECIPE = f"{Path(__file__).parent / 'exact_recipe.py'}:Stateful"
OPTIONS = ["--steps", "60", "--checkpoint-every", "25", "--log-every", "1", "--ema", "0.9", "--schedule", "cosine"]


def state(run_dir: Path, step: int) -> dict[str, Any]:
    """A checkpoint's tensors by dotted name."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(f"{prefix}.{i}", inner)
        else:
            flat[prefix] = value

    walk("", torch.load(run_dir / "checkpoints" / f"step-{step}" / "state", weights_only=True))
    return flat


def assert_same(run_dir: Path, other: Path, step: int) -> None:
    first, second = state(run_dir, step), state(other, step)
    assert first.keys() == second.keys()
    for key, value in first.items():
        equal = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert equal, key


@pytest.fixture(scope="module")
def uninterrupted(world2: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(world2, RECIPE, folder, *OPTIONS)
    return folder


@pytest.mark.parametrize(("kind", "who"), [("horovodrun", "one"), *slow(("mpirun", "all"))])
def test_sigterm_in_mid_epoch_and_resume_equals_the_uninterrupted_run(
    kind: str, who: str, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*HVDTRAIN, "train", RECIPE, "--run-dir", str(folder), *OPTIONS]
    with Job([*launcher(kind, 2), *command], env={"HVDTRAIN_TEST_STEP_SECONDS": "0.1"}) as job:
        wait_for_step(folder, 8)
        chosen = job.ranks()
        assert len(chosen) == 2
        for process in chosen[-1:] if who == "one" else chosen:
            process.send_signal(signal.SIGTERM)
        done = job.finish()
    assert done.returncode != 0
    summary = json.loads((folder / "summary.json").read_text())
    stopped = summary["steps"]
    assert 8 <= stopped < 25
    assert summary["finished"] is False
    assert f"saved; to continue: --resume --run-dir {folder}" in done.stdout

    # Only the folder is named: the rest comes from its config.json.
    resumed = harness.train(kind, 2, RECIPE, folder, "--resume")
    assert resumed["resumed_from"] == stopped
    assert resumed["steps"] == 60
    assert [row["step"] for row in rows(folder)] == list(range(1, 61))
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(uninterrupted)]
    assert_same(folder, uninterrupted, 60)
    assert resumed["train_loss"] == json.loads((uninterrupted / "summary.json").read_text())["train_loss"]


def test_a_rank_alone_exits_75(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [*HVDTRAIN, "train", RECIPE, "--run-dir", str(folder), *OPTIONS]
    with Job(command, env={"HVDTRAIN_TEST_STEP_SECONDS": "0.1"}) as job:
        wait_for_step(folder, 3)
        job.process.send_signal(signal.SIGINT)
        assert job.finish().returncode == 75


def test_a_checkpoint_goes_on_alike_on_another_world_size(worlds: KeptWorlds, tmp_path: Path) -> None:
    """Without batch norm and dropout, which see other micro-batches there."""
    recipe, folder = RECIPE.replace("Stateful", "Exact"), tmp_path / "run"
    train(worlds[1], recipe, tmp_path / "whole", "--steps", "40", "--log-every", "1")
    train(worlds[2], recipe, folder, "--steps", "20", "--log-every", "1")
    resumed = train(worlds[3], recipe, folder, "--resume", "--steps", "40")
    assert (resumed["resumed_from"], resumed["world_size"]) == (20, 3)
    losses, whole = ([row["loss"] for row in rows(path)] for path in (folder, tmp_path / "whole"))
    assert losses == pytest.approx(whole, rel=1e-12)


def broken(folder: Path, kind: str) -> str:
    """Damage the newest checkpoint; what the error must say."""
    newest = folder / "checkpoints" / "step-60"
    data = (newest / "state").read_bytes()
    meta = json.loads((newest / "meta.json").read_text())
    if kind == "truncated":
        (newest / "state").write_bytes(data[: len(data) // 2])
        return f"{newest} is damaged: its state has {len(data) // 2} of {len(data)} bytes"
    if kind == "flipped":
        (newest / "state").write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])
        return f"{newest} is damaged: the checksum of its state is wrong"
    if kind == "no meta":
        (newest / "meta.json").unlink()
        return f"{newest} is damaged: its meta.json cannot be read: No such file or directory"
    meta["format"] = "another"
    (newest / "meta.json").write_text(json.dumps(meta))
    return f"{newest} is damaged: its meta.json is not of the format 'hvdtrain checkpoint 2'"


@pytest.mark.parametrize("kind", ["truncated", "flipped", "no meta", "foreign"])
def test_a_bad_checkpoint_is_named_and_the_one_before_offered(
    kind: str, uninterrupted: Path, world1: KeptWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder, symlinks=True)
    message = broken(folder, kind)
    newest = folder / "checkpoints" / "step-60"
    offer = f"; step-50 is not damaged; to resume from it: rm -r {newest}"
    assert refusal(world1, RECIPE, folder, "--resume") == message + offer
    shutil.rmtree(newest)
    assert train(world1, RECIPE, folder, "--resume")["resumed_from"] == 50


def test_a_checkpoint_of_another_model_is_refused(uninterrupted: Path, world1: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder, symlinks=True)
    done = run("alone", 1, [*HVDTRAIN, "train", RECIPE, "--run-dir", str(folder), "--resume", "--width", "9"])
    assert done.returncode == 2
    assert "the checkpoint is of another model or optimizer: size mismatch for" in done.stderr
    text = refusal(world1, str(ROOT / "recipes/mlp.py"), folder, "--resume")
    assert text == f"{folder} is a run of recipe 'exact_recipe:Stateful', not of 'mlp'"


def test_resume_where_there_is_nothing_starts_at_step_0(world1: KeptWorld, tmp_path: Path) -> None:
    train(world1, RECIPE, tmp_path / "new", "--resume", "--steps", "2")
    assert "resumed   at step 0: no checkpoint yet" in world1.printed[0]


@pytest.mark.parametrize(
    ("changed", "now"),
    [(["--seed", "5"], "999 (--seed 5)"), (["--fewer", "9"], "990 (--seed 0)"), (["--fewer", "500"], "499 (--seed 0)")],
)
def test_another_order_in_mid_epoch_is_refused(
    changed: list[str], now: str, uninterrupted: Path, world2: KeptWorld, tmp_path: Path
) -> None:
    """After 60 steps of 30 it stands at 780 of 999. The refused run leaves the folder as it was."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder, symlinks=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = refusal(world2, RECIPE, folder, "--resume", "--steps", "70", *changed)
    began = "cannot resume at example 780 of an epoch: it began with 999 examples (--seed 0)"
    assert refused == f"{began}, the data now has {now}; use the original data and seed"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_setting_of_the_optimizer_that_is_given_anew(uninterrupted: Path, world1: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder, symlinks=True)
    train(world1, RECIPE, folder, "--resume", "--steps", "61", "--decay", "0.5")
    before, after = (state(folder, step) for step in (60, 61))
    key = ".optimizer.param_groups.0.weight_decay"
    assert (before[key], after[key]) == (0.01, 0.5)
    assert after[".optimizer.state.0.step"] == before[".optimizer.state.0.step"] + 1
    # Resumed once more without it, it stays.
    train(world1, RECIPE, folder, "--resume", "--steps", "62")
    assert state(folder, 62)[key] == 0.5


def test_a_batch_size_takes_the_place_of_a_batch_per_rank(world1: KeptWorld, tmp_path: Path) -> None:
    train(world1, RECIPE, tmp_path / "run", "--batch-per-rank", "10", "--scale-lr", "linear", "--steps", "3")
    assert train(world1, RECIPE, tmp_path / "run", "--resume", "--batch-size", "20", "--steps", "5")["steps"] == 5
    assert rows(tmp_path / "run")[-1]["samples"] == 3 * 10 + 2 * 20


def test_the_best_is_one_that_was_evaluated_itself(world1: KeptWorld, tmp_path: Path) -> None:
    """The checkpoints of steps 6 and 9 hold the evaluation of step 4 and 8."""
    folder = tmp_path / "run"
    train(world1, RECIPE, folder, "--steps", "10", "--checkpoint-every", "3", "--eval-every", "4")
    assert (folder / "checkpoints" / "best").resolve().name == "step-10"


def test_an_old_checkpoint_that_cannot_be_removed(world1: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(world1, RECIPE, folder, "--steps", "2", "--checkpoint-every", "2")
    with small_disk(folder / "checkpoints" / "step-1", 1):
        command = [*HVDTRAIN, "train", RECIPE, "--run-dir", str(folder), "--resume", "--steps", "6", "--keep", "1"]
        done = run("alone", 1, command)
    assert done.returncode == 0, done.stderr
    assert "warning: old checkpoints cannot be removed: " in done.stderr
    assert "step-6" in {path.name for path in (folder / "checkpoints").iterdir()}


def test_the_last_checkpoints_and_the_best_are_kept(world1: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(world1, RECIPE, folder, "--steps", "50", "--checkpoint-every", "5", "--eval-every", "5", "--keep", "2")
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    losses = {row["step"]: row["eval_loss"] for row in rows(folder) if "eval_loss" in row}
    assert len(losses) == 10
    best = f"step-{min(losses, key=losses.__getitem__)}"
    assert kept == {"step-45", "step-50", best, "best"}
    assert (folder / "checkpoints" / "best").resolve().name == best


def test_a_disk_that_is_full_at_the_end(world2: KeptWorld, tmp_path: Path) -> None:
    """What a run leaves behind cannot be written: it fails and says so; resumed, nothing is lost."""
    recipe = [str(ROOT / "tests" / "ranks" / "slow_recipe.py"), "--pause", "0.05", "--epochs", "2", "--log-every", "1"]
    with small_disk(tmp_path / "run", 2) as disk:
        options = ["--run-dir", str(disk.path), "--checkpoint-every", "5"]
        with Job([*HVDTRAIN, "launch", "-np", "2", *recipe, *options]) as job:
            wait_for_step(disk.path, 6)
            disk.fill()
            done = job.finish()
        assert done.returncode == 1
        assert "cannot write step 24's checkpoint" in done.stderr and "No space left on device" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        disk.empty()
        train(world2, recipe[0], disk.path, "--resume")
        assert [row["step"] for row in rows(disk.path)] == list(range(1, 25))
        verified = run("alone", 1, [*HVDTRAIN, "ledger", "verify", str(disk.path)])
        assert verified.stdout.startswith("exactly once: 2 epochs x "), verified.stdout
