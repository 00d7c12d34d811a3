"""Dealt embedding tables in elastic runs: a rank that is lost costs no step, wherever it is in it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import test_faults
from tests.ranks.elastic import ElasticJob, losses, verify
from tests.ranks.test_sharded_elastic import FAULTS, job_with, train_without_faults
from tests.ranks.test_sharded_optimizer import assert_same
from tests.support.worlds import KeptWorld, train

RECIPES = Path(__file__).parent / "table_elastic_recipes.py"
RECIPE = f"{RECIPES}:MortalTables"
SLOW = f"{RECIPES}:SlowTables"
OPTIONS = ("--ema", "0.9", "--checkpoint-every", "50", "--log-every", "1")  # 24 steps
GONE = "are gone"
SPLIT = "missed:{0}:1,passed:{0}:2"  # rank 0 makes the update, rank 1 does not know that it can, rank 2 is lost
FOUR_POINTS = f"mirror:3:1,{SPLIT.format(6)},forming:6:0,backward:10:0"


@pytest.fixture
def alone(world1: KeptWorld, tmp_path: Path) -> Callable[..., Path]:
    """What trains the recipe on one rank, and returns the run folder."""

    def train_alone(*options: str) -> Path:
        train(world1, RECIPE, tmp_path / "alone", "--threads", "1", *OPTIONS, *options)
        return tmp_path / "alone"

    return train_alone


def start(folder: Path, hosts: str, *options: str) -> ElasticJob:
    return ElasticJob(folder, hosts, *OPTIONS, *options, most=6, recipe=RECIPE)


def run_with_faults(folder: Path, ranks: int, faults: str, *options: str) -> ElasticJob:
    """A run in which these happen, to its end."""
    with start(folder, f"localhost:{ranks}", "--faults", faults, *options) as job:
        job.end()
    return job


def check(job: ElasticJob, expected: Path) -> None:
    """Each step was made once, with the losses of one rank, and the weights and the optimizer's state are its."""
    verify(job.run_dir)
    np.testing.assert_allclose(losses(job.run_dir), losses(expected), rtol=1e-10)
    assert_same(expected, job.run_dir, 1e-10)


def test_a_rank_dies_at_each_point_of_a_step(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """In the mirrors' exchange, where only some have updated, while a world is formed, and in backward."""
    options = ("--kind", "adagrad", "--sparse", "--together", "--clip-norm", "0.5")
    job = run_with_faults(tmp_path, 4, FOUR_POINTS, "--pause", "0.1", *options)
    check(job, alone(*options))
    assert job.summary()["membership_changes"] >= 3
    assert GONE not in job.said()
    assert "tables    " in job.said() and "mirrored" in job.said()


KINDS = [("--kind", "sgd", "--sparse"), ("--kind", "momentum", "--together"), ("--kind", "adamw", "--micro-batch", "3")]
POINTS = [  # of four ranks on one host each mirrors the next one: two that follow each other are not lost in "forming"
    "forward:4:1",
    "backward:4:2",
    "mirror:4:0",
    "held:4:1",
    SPLIT.format(4),
    "missed:4:0+1,passed:4:2",
    "passed:4:0",
    "averaged:4:1",
    "updated:4:2",
    "held:4:1,forming:4:3",
    f"{SPLIT.format(4)},forming:4:0",
]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", KINDS, ids=["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("faults", POINTS)
def test_each_kind_of_optimizer_survives_each_point(
    kind: tuple[str, ...], faults: str, tmp_path: Path, alone: Callable[..., Path]
) -> None:
    job = run_with_faults(tmp_path, 4 if "forming" in faults else 3, faults, *kind)
    check(job, alone(*kind))
    assert job.summary()["membership_changes"] >= 1 and GONE not in job.said()


@pytest.mark.slow
def test_rows_and_their_mirror_are_lost_together(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """The run goes back to the newest checkpoint, and says so."""
    job = run_with_faults(tmp_path, 3, "forward:16:1+2", "--checkpoint-every", "6")
    text = "rows of the embedding tables of rank 2 and its mirror are gone: continuing from step 12's checkpoint"
    assert text in job.said()
    check(job, alone())


@pytest.mark.slow
def test_rows_and_their_mirror_are_lost_before_a_checkpoint(tmp_path: Path) -> None:
    with start(tmp_path, "localhost:3", "--faults", "forward:2:1+2") as job:
        job.end(1)
    text = "rows of the embedding tables of rank 2 and its mirror are gone, and there is no checkpoint yet: save more"
    assert text in job.said()


@pytest.mark.slow
def test_newcomers_and_notices_cost_no_step(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """One rank becomes three on two hosts; then a slot is told that it goes, and another one."""
    options = ("--kind", "momentum")
    with start(tmp_path, "localhost:1", "--pause", "0.3", *options) as job:
        job.step(2)
        job.hosts("localhost:1 127.0.0.1:2")
        job.world(3, 90)
        for left in (2, 1):
            job.more(1)
            job.supervisor(left).send_signal(signal.SIGTERM)
            job.world(left)
        job.end()
    check(job, alone(*options))
    assert GONE not in job.said()


@pytest.mark.slow
def test_a_run_is_resumed_on_other_ranks(tmp_path: Path, alone: Callable[..., Path], world2: KeptWorld) -> None:
    """Ten steps in an elastic run, four by two ranks that stay, the rest in an elastic run again."""
    options = ("--kind", "adamw")
    run_with_faults(tmp_path, 3, "mirror:4:1", "--steps", "10", *options)
    train(world2, RECIPE, tmp_path / "run", "--resume", "--steps", "14")
    with start(tmp_path, "localhost:4", "--resume", "--epochs", "6", "--faults", "mirror:18:0", *options) as job:
        job.end()
    check(job, alone(*options))


@pytest.mark.slow
def test_whole_tables_and_what_cannot_be_dealt(tmp_path: Path, alone: Callable[..., Path]) -> None:
    with start(tmp_path, "localhost:2", "--kind", "adafactor") as job:
        job.end(1)
    text = (
        "Adafactor does not update each row of a table alone: use SGD, Adagrad, Adam or SparseAdam, or give --tables "
    )
    assert text in job.said()
    options = ("--kind", "adafactor", "--tables", "whole")
    job = run_with_faults(tmp_path, 2, "forward:4:1", *options)
    check(job, alone(*options))
    assert "tables    " not in job.said()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_recommend_survives_lost_ranks(world1: KeptWorld, tmp_path: Path) -> None:
    recipe, options = f"{RECIPES}:MortalRecommend", ("--examples", "24000", "--epochs", "1", "--log-every", "1")
    train(world1, recipe, tmp_path / "alone", "--threads", "1", *options)
    faults = ("--faults", "forward:20:1,forward:50:0", "--pause", "0.05")
    with ElasticJob(tmp_path, "localhost:3", *options, *faults, recipe=recipe) as job:
        job.end()
    verify(job.run_dir)
    np.testing.assert_allclose(losses(job.run_dir), losses(tmp_path / "alone"), rtol=1e-6)
    assert_same(tmp_path / "alone", job.run_dir, 1e-6)
    assert job.summary()["membership_changes"] >= 2


@pytest.fixture(scope="module")
def without_faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    return train_without_faults(tmp_path_factory.mktemp("reference") / "run", SLOW)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("survive", FAULTS)
def test_faults_of_other_runs(
    survive: Callable[[Path, Any], None],
    tmp_path: Path,
    without_faults: tuple[list[float], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of three ranks that are killed at once may have rows and their mirror."""
    monkeypatch.setattr(test_faults, "ElasticJob", job_with(SLOW))
    survive(tmp_path, without_faults)
