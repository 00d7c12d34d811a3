"""JAX recipes give the same bits: on any number of ranks, by each launcher, resumed, and in elastic runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.ranks import harness
from tests.ranks.elastic import ElasticJob, losses, verify
from tests.ranks.harness import ROOT
from tests.ranks.test_deterministic import digest
from tests.ranks.test_jax_options import column
from tests.support.worlds import KeptWorld, KeptWorlds, train

DIGITS = str(ROOT / "recipes" / "digits_jax.py")
OWN = str(Path(__file__).parent / "jax_digits_recipes.py")
SAME_BITS = ["--epochs", "2", "--deterministic", "--dropout", "0.2", "--clip-norm", "0.5", "--micro-batch", "4"]
SAME_BITS += ["--ema", "0.9"]
START_SECONDS = 90.0  # of ranks that import torch and JAX, and compile


@pytest.fixture(scope="module")
def bits_alone(world1: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bits") / "run"
    train(world1, DIGITS, folder, *SAME_BITS)
    return digest(folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_bits_on_any_number_of_ranks(ranks: int, worlds: KeptWorlds, bits_alone: str, tmp_path: Path) -> None:
    train(worlds[ranks], DIGITS, tmp_path / "run", *SAME_BITS)
    assert digest(tmp_path / "run") == bits_alone


@pytest.mark.slow
def test_the_same_bits_with_another_number_of_ranks_in_mid_epoch(
    world2: KeptWorld, world3: KeptWorld, bits_alone: str, tmp_path: Path
) -> None:
    """2 ranks until step 5 of the first epoch's 12, in its warm-up, which is the same in either's schedule; then 3."""
    train(world2, DIGITS, tmp_path / "run", *SAME_BITS[2:], "--steps", "5")
    resumed = train(world3, DIGITS, tmp_path / "run", "--resume", "--epochs", "2")
    assert (resumed["resumed_from"], resumed["world_size"], resumed["steps"]) == (5, 3, 24)
    assert digest(tmp_path / "run") == bits_alone


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["mpirun", "horovodrun", "horovodrun-mpi"])
def test_the_same_bits_by_each_launcher(kind: str, bits_alone: str, tmp_path: Path) -> None:
    summary = harness.train(kind, 2, DIGITS, tmp_path / "run", *SAME_BITS, timeout=200)
    assert summary["world_size"] == 2
    assert digest(tmp_path / "run") == bits_alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--ema", "0.9", "--micro-batch", "20", "--amp", "fp16"],
        ["--compression", "topk:0.05,min=100,warmup=0", "--checkpoint-residuals", "exact"],
        ["--compression", "powersgd:2,min=100,warmup=0", "--checkpoint-residuals", "exact"],
    ],
    ids=["ema fp16", "topk", "powersgd"],
)
def test_a_resumed_run_has_the_bits_of_the_whole_one(options: list[str], world2: KeptWorld, tmp_path: Path) -> None:
    options = [*options, "--dropout", "0.1", "--steps", "16", "--checkpoint-every", "10", "--eval-every", "100"]
    train(world2, DIGITS, tmp_path / "whole", *options, "--threads", "1", "--log-every", "1")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-16")
    assert train(world2, DIGITS, tmp_path / "resumed", "--resume")["resumed_from"] == 10
    assert column(tmp_path / "resumed", "loss") == column(tmp_path / "whole", "loss")
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")


# Elastic runs.


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_rank_and_a_newcomer_change_no_bit(tmp_path: Path, bits_alone: str) -> None:
    """With --deterministic; the ledger says that each example was visited exactly once."""
    options = [*SAME_BITS, "--pause", "0.1"]
    with ElasticJob(tmp_path, "localhost:2", *options, launch=[], recipe=f"{OWN}:SlowDigits", most=3) as job:
        job.world(2, START_SECONDS)
        job.more(2)
        job.kill_any()
        job.world(1)
        job.more(1)
        job.hosts("localhost:2 127.0.0.1:1")
        job.world(3, START_SECONDS)
        job.end()
    assert job.summary()["membership_changes"] >= 2
    assert len(losses(job.run_dir)) == 24
    verify(job.run_dir)
    assert digest(job.run_dir) == bits_alone


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rank_0_and_compression_in_an_elastic_run(tmp_path: Path) -> None:
    options = ["--pause", "0.5", "--compression", "int8,min=64", "--ema", "0.9"]
    with ElasticJob(tmp_path, "localhost:3", *options, recipe=f"{OWN}:SlowDigits") as job:
        job.world(3, START_SECONDS)
        job.more(5)
        job.kill(0)
        job.world(2)
        job.world(3, START_SECONDS)
        job.more(2)
        job.kill(1, 2)
        job.world(3, START_SECONDS)
        job.end()
    verify(job.run_dir)
    assert len(losses(job.run_dir)) == 72
    assert job.summary()["eval"]["accuracy"] > 0.93
