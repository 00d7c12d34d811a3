"""--tensor and --shard model in elastic runs: a lost rank takes its replica out, the others continue at that step."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ranks.elastic import ElasticJob, check_losses, losses, train_reference, verify
from tests.ranks.harness import ROOT, train

RECIPE = str(ROOT / "tests" / "ranks" / "slow_divided_recipe.py") + ":SlowDivided"
TENSOR, SHARD = ("--tensor", "2"), ("--shard", "model", "--shard-ranks", "2")
OPTIONS = ["--epochs", "3", "--lr", "0.002", "--ema", "0.9", "--clip-norm", "1"]
WAYS = pytest.mark.parametrize("way", [TENSOR, SHARD], ids=["tensor", "shard"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run without a fault, on one rank."""
    return train_reference(tmp_path_factory.mktemp("reference"), RECIPE, *OPTIONS)


def start(folder: Path, *options: str) -> ElasticJob:
    """Two replicas of two ranks."""
    return ElasticJob(folder, "localhost:4", "--pause", "0.4", *OPTIONS, *options, recipe=RECIPE)


@pytest.mark.slow
@WAYS
def test_a_killed_rank_takes_its_replica_out_and_brings_it_back(
    tmp_path: Path, reference: list[float], way: tuple[str, ...]
) -> None:
    """One that is not rank 0, then rank 0: the other rank of its replica is started again with it."""
    with start(tmp_path, *way) as job:
        job.step(3)
        job.kill_and_rejoin(3, 0, world=4, left=2)
        job.end()
    check_losses(job, reference)
    assert job.summary()["membership_changes"] >= 4
    train(
        "alone",
        1,
        RECIPE,
        job.run_dir,
        "--resume",
        "--epochs",
        "4",
        "--tensor",
        "1",
        "--shard",
        "none",
        "--shard-ranks",
        "0",
    )


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        pytest.param(way, fault, marks=() if (way, fault) == (SHARD, "backward") else pytest.mark.slow)
        for way in (TENSOR, SHARD)
        for fault in ("before:8", "split:8", "backward", "evaluate")
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value.partition(":")[0],
)
def test_ranks_are_lost_at_any_point(tmp_path: Path, reference: list[float], way: tuple[str, ...], fault: str) -> None:
    """Before all can update, when one column has and the other has not, in a backward pass, in an evaluation."""
    with start(tmp_path, *way) as job:
        job.step(4)
        job.fault.write_text(fault)
        job.until(lambda: not job.fault.exists(), "fault")
        job.world(2)
        job.more(2)
        job.world(4)
        job.end()
    check_losses(job, reference)


@pytest.mark.slow
@WAYS
def test_an_error_of_the_recipe_repeats_the_step(tmp_path: Path, reference: list[float], way: tuple[str, ...]) -> None:
    """On one rank or more: the others of its replica wait for it in the middle of a pass."""
    with start(tmp_path, *way) as job:
        job.step(3)
        job.fault.write_text("score-once")
        job.until(lambda: "world     4 ranks" in job.said(), "another world of 4", hold=True)
        job.end()
    check_losses(job, reference)
    assert "retrying once after an error after step" in job.said()


@pytest.mark.slow
@WAYS
def test_ranks_that_every_replica_has_lost_come_from_the_checkpoint(
    tmp_path: Path, reference: list[float], way: tuple[str, ...]
) -> None:
    with start(tmp_path, *way, "--checkpoint-every", "2") as job:
        job.step(5)
        job.kill(1, 2)
        job.until(lambda: "world     4 ranks" in job.said(), "another world of 4", hold=True)
        job.end()
    check_losses(job, reference)


@pytest.mark.slow
@WAYS
def test_what_compression_has_not_sent_stays_with_the_others(tmp_path: Path, way: tuple[str, ...]) -> None:
    """The replicas have the same bits, or --diagnose ends the run."""
    with start(tmp_path, *way, "--compression", "int8,min=8", "--diagnose") as job:
        job.step(3)
        job.kill(3)
        job.world(2)
        job.more(2)
        job.world(4)
        job.end()
    assert losses(job.run_dir)[-1] < losses(job.run_dir)[0]
    verify(job.run_dir)


@pytest.mark.slow
@WAYS
def test_a_notice_to_one_slot_takes_its_replica_out_for_good(
    tmp_path: Path, reference: list[float], way: tuple[str, ...]
) -> None:
    with start(tmp_path, *way) as job:
        job.step(3)
        job.supervisor(3).send_signal(signal.SIGTERM)
        job.world(2)
        job.more(3)
        job.end()
    check_losses(job, reference)


@pytest.mark.slow
@WAYS
def test_a_newcomer_that_crashes_while_its_replica_is_built(
    tmp_path: Path, reference: list[float], way: tuple[str, ...]
) -> None:
    """The others of it are started again with the next one; those who train notice nothing."""
    with start(tmp_path, *way) as job:
        job.step(3)
        job.fault.write_text("init-crash")
        job.kill(3)
        job.world(2)
        job.until(lambda: job.done() > 6, "step")
        job.fault.unlink()
        job.world(4, timeout=120)
        job.end()
    check_losses(job, reference)
