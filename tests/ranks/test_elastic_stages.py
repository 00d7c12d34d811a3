"""Replicas of several ranks in elastic runs: a lost rank takes its replica out, and the others go on at that step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.elastic import ElasticJob, check_losses, train_reference
from tests.ranks.harness import ROOT
from tests.support.slow_cases import slow

RECIPE = str(ROOT / "tests" / "ranks" / "slow_stages_recipe.py") + ":SlowStages"
OPTIONS = ["--epochs", "2", "--lr", "0.02"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run without a fault, on one rank."""
    return train_reference(tmp_path_factory.mktemp("reference"), RECIPE, *OPTIONS)


def start(folder: Path, *options: str) -> ElasticJob:
    """Two replicas of two stages."""
    return ElasticJob(folder, "localhost:4", "--pause", "0.4", "--stages", "2", *OPTIONS, *options, recipe=RECIPE)


@pytest.mark.slow
def test_a_killed_stage_takes_its_replica_out_and_brings_it_back(tmp_path: Path, reference: list[float]) -> None:
    """One that is not rank 0, then rank 0, whose replica's other rank has no state any more."""
    with start(tmp_path) as job:
        job.step(3)
        job.kill_and_rejoin(3, 0, world=4, left=2)
        job.end()
    check_losses(job, reference)
    assert job.summary()["membership_changes"] >= 4


@pytest.mark.parametrize("fault", [*slow("before"), "split"])
def test_an_update_is_made_by_all_or_by_none(tmp_path: Path, reference: list[float], fault: str) -> None:
    """A rank is lost before all can update, and when one column has and the other has not."""
    with start(tmp_path) as job:
        job.step(4)
        job.fault.write_text(f"{fault}:8")
        job.step(7)
        job.world(2)
        job.more(2)
        job.world(4)
        job.end()
    check_losses(job, reference)


@pytest.mark.slow
def test_a_part_that_every_replica_has_lost_comes_from_the_checkpoint(tmp_path: Path, reference: list[float]) -> None:
    with start(tmp_path, "--checkpoint-every", "2") as job:
        job.step(5)
        job.kill(1, 3)
        job.until(lambda: "with its part of the model: continuing from step" in job.said(), "a checkpoint", hold=True)
        job.world(4)
        job.end()
    check_losses(job, reference)
