"""Replicas of several ranks in elastic runs: a lost rank takes its replica out, and the others go on at that step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.ranks.elastic import ElasticJob, losses, verify
from tests.ranks.harness import ROOT, train

RECIPE = str(ROOT / "tests" / "ranks" / "slow_stages_recipe.py") + ":SlowStages"
OPTIONS = ["--epochs", "2", "--lr", "0.02"]
STEPS = 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[float]]:
    """The losses of the run without a fault, on one rank."""
    folder = tmp_path_factory.mktemp("reference")
    train("alone", 1, RECIPE, folder / "run", "--pause", "0", "--log-every", "1", "--threads", "1", *OPTIONS)
    yield losses(folder / "run")


def start(folder: Path, *options: str) -> ElasticJob:
    """Two replicas of two stages."""
    return ElasticJob(folder, "localhost:4", "--pause", "0.4", "--stages", "2", *OPTIONS, *options, recipe=RECIPE)


def check(job: ElasticJob, expected: list[float]) -> None:
    """Each step was made once, with the reference's losses, and the ledger says so too."""
    found = losses(job.run_dir)
    assert len(found) == STEPS
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    verify(job.run_dir)


@pytest.mark.slow
def test_a_killed_stage_takes_its_replica_out_and_brings_it_back(tmp_path: Path, reference: list[float]) -> None:
    """One that is not rank 0, then rank 0, whose replica's other rank has no state any more."""
    with start(tmp_path) as job:
        job.step(3)
        job.kill(3)
        job.world(2)
        job.more(2)
        job.world(4)
        job.more(2)
        job.kill(0)
        job.world(2)
        job.more(2)
        job.world(4)
        job.end()
    check(job, reference)
    assert job.summary()["membership_changes"] >= 4


@pytest.mark.parametrize("fault", [pytest.param("before", marks=pytest.mark.slow), "split"])
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
    check(job, reference)


@pytest.mark.slow
def test_a_part_that_every_replica_has_lost_comes_from_the_checkpoint(tmp_path: Path, reference: list[float]) -> None:
    with start(tmp_path, "--checkpoint-every", "2") as job:
        job.step(5)
        job.kill(1, 3)
        job.until(lambda: "with its part of the model: continuing from step" in job.said(), "a checkpoint", hold=True)
        job.world(4)
        job.end()
    check(job, reference)
