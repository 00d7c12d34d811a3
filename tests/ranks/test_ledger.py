"""What real ranks consumed, through kills and changes of their number: each example once an epoch."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest

from hvdtrain.recipe import order
from hvdtrain.training import orders
from tests.ranks import harness
from tests.ranks.harness import HVDTRAIN, Job, launcher, run, wait_for_step
from tests.support.worlds import KeptWorld, train, train_here

RECIPES = Path(__file__).parent / "exact_recipe.py"
EXACT, STATEFUL = f"{RECIPES}:Exact", f"{RECIPES}:Stateful"
SLOW = {"HVDTRAIN_TEST_STEP_SECONDS": "0.1"}


def verified(run_dir: Path) -> str:
    done = run("alone", 1, [*HVDTRAIN, "ledger", "verify", str(run_dir)])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout.rstrip()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ragged_batches_and_accumulation_on_three_ranks(workers: str, world3: KeptWorld, tmp_path: Path) -> None:
    """1,003 examples in batches of 50: the last has 3; else a rank takes 4 passes."""
    options = ["--batch-size", "50", "--micro-batch", "5", "--epochs", "3", "--workers", workers]
    train(world3, EXACT, tmp_path / "run", *options)
    assert verified(tmp_path / "run") == "exactly once: 3 epochs x 1003 examples, 63 steps (1 segment)"


def test_a_rank_without_examples(world3: KeptWorld, tmp_path: Path) -> None:
    """A last batch of 1 for three ranks."""
    train(world3, EXACT, tmp_path / "run", "--batch-size", "167", "--epochs", "2")
    assert verified(tmp_path / "run") == "exactly once: 2 epochs x 1003 examples, 14 steps (1 segment)"


def test_killed_in_mid_epoch_and_resumed_on_more_ranks_with_another_batch(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--checkpoint-every", "10", "--log-every", "1", "--epochs", "2"]
    with Job(
        [*launcher("horovodrun", 2), *HVDTRAIN, "train", STATEFUL, "--run-dir", str(folder), *options], SLOW
    ) as job:
        wait_for_step(folder, 14)
        for process in job.ranks():
            process.send_signal(signal.SIGKILL)
        assert job.finish().returncode != 0
    line = verified(folder)
    assert line.startswith("exactly once: 0 epochs x 999 examples and ")
    assert line.endswith("(1 segment)")

    command = [*HVDTRAIN, "train", STATEFUL, "--run-dir", str(folder), "--resume", "--batch-size", "21"]
    with Job([*launcher("horovodrun", 3), *command], SLOW) as job:
        wait_for_step(folder, 25)
        for process in job.ranks():
            process.send_signal(signal.SIGKILL)
        assert job.finish().returncode != 0
    assert verified(folder).endswith("(2 segments)")

    summary = harness.train("mpirun", 2, STATEFUL, folder, "--resume")
    assert summary["resumed_from"] >= 20
    assert verified(folder) == f"exactly once: 2 epochs x 999 examples, {summary['steps']} steps (3 segments)"
    assert summary["samples_seen"] == 2 * 999


def test_skipped_steps_consumed_their_ids(world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--epochs", "3", "--skip-nonfinite", "3"]
    summary = train(world2, f"{RECIPES.with_name('odd_recipes.py')}:NanInput", tmp_path / "run", *options)
    assert summary["skipped_nonfinite"] == 3
    assert verified(tmp_path / "run") == "exactly once: 3 epochs x 48 examples, 9 steps (1 segment)"


def train_in_an_order_of_its_own(run_dir: Path) -> None:
    """Train with another order on each rank than rank 0's, which no option can make."""
    import horovod.torch as hvd

    class Other(order.SampleOrder):
        def __init__(self, examples: int, seed: int, epoch: int) -> None:
            super().__init__(examples, seed + hvd.rank(), epoch)

    with mock.patch.object(orders, "SampleOrder", Other):
        train_here(EXACT, run_dir, ("--steps", "5"))


def test_ranks_that_do_not_agree_on_the_order_are_found_out(world2: KeptWorld, tmp_path: Path) -> None:
    """What they feed is not what rank 0 believes."""
    world2.run(train_in_an_order_of_its_own, tmp_path / "run")
    done = run("alone", 1, [*HVDTRAIN, "ledger", "verify", str(tmp_path / "run"), "--json"])
    assert done.returncode == 1
    findings = json.loads(done.stdout)["findings"]
    assert [(found["kind"], found["step"]) for found in findings] == [("ids", step) for step in range(1, 6)]


def test_no_ledger_option_writes_no_ledger(world1: KeptWorld, tmp_path: Path) -> None:
    train(world1, EXACT, tmp_path / "run", "--steps", "3", "--no-ledger")
    assert not (tmp_path / "run" / "ledger").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["ledger"] is False
    done = run("alone", 1, [*HVDTRAIN, "ledger", "verify", str(tmp_path / "run")])
    assert done.returncode == 2
    assert "has no ledger" in done.stderr


def test_resuming_without_the_ledger_takes_back_what_is_undone(world1: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(world1, EXACT, folder, "--steps", "12", "--batch-size", "50", "--checkpoint-every", "5")
    shutil.rmtree(folder / "checkpoints" / "step-12")
    assert train(world1, EXACT, folder, "--resume", "--no-ledger", "--steps", "15")["resumed_from"] == 10
    line = "exactly once: 0 epochs x 1003 examples and 500 examples of epoch 1, which is not complete, 10 steps"
    assert verified(folder) == f"{line} (2 segments)"
