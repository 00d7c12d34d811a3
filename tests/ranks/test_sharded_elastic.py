"""--shard optimizer in elastic runs: a rank that is lost costs no step, wherever it is in it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.system.errors import UserError
from hvdtrain.training.options import check_elastic_options, make_run_options
from tests.ranks import harness, test_faults
from tests.ranks.elastic import RECIPE as DIGITS
from tests.ranks.elastic import ElasticJob, losses, verify
from tests.ranks.test_sharded_optimizer import assert_same
from tests.support.worlds import KeptWorld, train

RECIPES = Path(__file__).parent / "sharded_elastic_recipes.py"
RECIPE = f"{RECIPES}:Mortal"
OPTIONS = ("--epochs", "3", "--ema", "0.9", "--skips", "--checkpoint-every", "50")  # 33 steps
SHARD = ("--shard", "optimizer")
GONE = "and its mirror are gone"
FOUR_POINTS = "some:3:1,gathered:3:2,forward:6:3,updated:9:2,gathered:12:0"


@pytest.fixture
def alone(world1: KeptWorld, tmp_path: Path) -> Callable[..., Path]:
    """What trains the recipe on one rank without shards, and returns the run folder."""

    def train_alone(*options: str, recipe: str = "Mortal") -> Path:
        train(world1, f"{RECIPES}:{recipe}", tmp_path / "alone", "--threads", "1", *OPTIONS, *options)
        return tmp_path / "alone"

    return train_alone


@pytest.fixture(scope="module")
def without_faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    return train_without_faults(tmp_path_factory.mktemp("reference") / "run", DIGITS)


def train_without_faults(folder: Path, recipe: str) -> tuple[list[float], dict[str, Any]]:
    """Return what `tests.ranks.test_faults` compares with."""
    summary = harness.train("alone", 1, recipe, folder, "--pause", "0", "--log-every", "1", "--threads", "1")
    return losses(folder), summary


def start(folder: Path, hosts: str, *options: str, recipe: str = "Mortal") -> ElasticJob:
    return ElasticJob(folder, hosts, *OPTIONS, *SHARD, *options, most=6, recipe=f"{RECIPES}:{recipe}")


def run_with_faults(folder: Path, ranks: int, faults: str, *options: str, recipe: str = "Mortal") -> ElasticJob:
    """A run in which these happen, to its end."""
    with start(folder, f"localhost:{ranks}", "--faults", faults, *options, recipe=recipe) as job:
        job.end()
    verify(job.run_dir)
    return job


def test_a_rank_dies_at_each_point_of_a_step(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """Where the gather has reached only some, before the reduction, after the update, and after the gather."""
    job = run_with_faults(tmp_path, 5, FOUR_POINTS, "--pause", "0.1")
    assert_same(alone(), job.run_dir, 1e-12)
    assert job.summary()["membership_changes"] >= 4
    assert GONE not in job.said()
    assert "shard     optimizer: " in job.said() and "mirrored" in job.said()


@pytest.mark.slow
def test_newcomers_and_notices_cost_no_step(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """One rank becomes three on two hosts; then a slot is told that it goes, and another one."""
    with start(tmp_path, "localhost:1", "--pause", "0.3", "--kind", "sgd") as job:
        job.step(2)
        job.hosts("localhost:1 127.0.0.1:2")
        job.world(3, 90)
        for left in (2, 1):
            job.more(1)
            job.supervisor(left).send_signal(signal.SIGTERM)
            job.world(left)
        job.end()
    verify(job.run_dir)
    assert_same(alone("--kind", "sgd"), job.run_dir, 1e-12)
    assert GONE not in job.said()


@pytest.mark.slow
def test_a_part_and_its_mirror_leave_together(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """Two of three ranks are told at once, and have saved the step after which they leave."""
    with start(tmp_path, "localhost:3", "--pause", "0.3") as job:
        job.step(4)
        for rank in (1, 2):
            job.supervisor(rank).send_signal(signal.SIGTERM)
        job.world(1)
        job.end()
    verify(job.run_dir)
    assert_same(alone(), job.run_dir, 1e-12)


@pytest.mark.slow
def test_deterministic_runs_keep_their_bits_when_ranks_are_lost(tmp_path: Path, alone: Callable[..., Path]) -> None:
    options = ("--deterministic", "--clip-norm", "0.5", "--dtype", "float32")
    job = run_with_faults(tmp_path, 3, "updated:4:1,some:8:0,gathered:8:1", *options)
    assert_same(alone(*options), job.run_dir)
    assert job.summary()["membership_changes"] >= 1


@pytest.mark.slow
def test_a_part_and_its_mirror_are_lost_together(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """The run goes back to the newest checkpoint, and says so."""
    job = run_with_faults(tmp_path, 3, "forward:16:1+2", "--checkpoint-every", "6")
    text = "the optimizer's state of rank 2 and its mirror are gone: continuing from step 12's checkpoint"
    assert text in job.said()
    assert_same(alone(), job.run_dir, 1e-12)


@pytest.mark.slow
def test_a_part_and_its_mirror_are_lost_before_a_checkpoint(tmp_path: Path) -> None:
    with start(tmp_path, "localhost:3", "--faults", "forward:5:1+2") as job:
        job.end(1)
    text = (
        "the optimizer's state of rank 2 and its mirror are gone, and there is no checkpoint yet: save more often by "
    )
    assert text in job.said()


@pytest.mark.parametrize("options", [(), ("--kind", "adafactor"), ("--deterministic",)], ids=["adamw", "whole", "sums"])
def test_a_mirror_has_the_bits_of_its_owner(options: tuple[str, ...], world3: KeptWorld, tmp_path: Path) -> None:
    more = ("--mirror", "1", "--compares", "--clip-norm", "0.5", "--bucket-mib", "0.001", *options)
    train(world3, RECIPE, tmp_path / "mirrored", *OPTIONS, *SHARD, *more)
    train(
        world3, RECIPE, tmp_path / "single", *OPTIONS, *SHARD, "--clip-norm", "0.5", "--bucket-mib", "0.001", *options
    )
    assert_same(tmp_path / "single", tmp_path / "mirrored", 1e-12)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adafactor"])
@pytest.mark.parametrize("faults", ["forward:4:1", "updated:4:2", "gathered:4:0", "some:4:1,gathered:4:2"])
def test_each_kind_of_optimizer_survives_each_point(
    kind: str, faults: str, tmp_path: Path, alone: Callable[..., Path]
) -> None:
    job = run_with_faults(tmp_path, 3, faults, "--kind", kind)
    assert_same(alone("--kind", kind), job.run_dir, 1e-12)
    assert job.summary()["membership_changes"] >= 1 and GONE not in job.said()


@pytest.mark.slow
@pytest.mark.parametrize("faults", ["updated:4:2", "some:4:1,gathered:4:2", "forward:6:1"])
def test_several_optimizers_survive_each_point(faults: str, tmp_path: Path, alone: Callable[..., Path]) -> None:
    job = run_with_faults(tmp_path, 3, faults, recipe="Twins")
    assert_same(alone(recipe="Twins"), job.run_dir, 1e-12)
    assert job.summary()["membership_changes"] >= 1 and GONE not in job.said()


@pytest.mark.slow
@pytest.mark.parametrize("faults", ["updated:4:2", "some:4:1,gathered:4:2"])
def test_a_loss_scale_survives_an_update_that_is_not_finished(
    faults: str, tmp_path: Path, alone: Callable[..., Path]
) -> None:
    """Sums in float16 depend on the ranks."""
    options = ("--kind", "sgd", "--dtype", "float32", "--amp", "fp16", "--clip-norm", "1", "--micro-batch", "4")
    job = run_with_faults(tmp_path, 3, faults, *options)
    assert_same(alone(*options), job.run_dir, 0.02)
    assert job.summary()["membership_changes"] >= 1 and GONE not in job.said()


FAULTS: list[Callable[[Path, Any], None]] = [
    test_faults.test_workers_that_are_killed,
    test_faults.test_all_workers_are_killed,
    test_faults.test_hosts_come_and_go,
    test_faults.test_a_newcomer_that_became_first_is_removed,
    test_faults.test_a_notice_costs_no_step,
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("survive", FAULTS)
def test_faults_of_other_runs(
    survive: Callable[[Path, Any], None],
    tmp_path: Path,
    without_faults: tuple[list[float], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of three ranks that are killed at once may be a part's owner and its mirror."""
    monkeypatch.setattr(test_faults, "ElasticJob", job_with(DIGITS, *SHARD))
    survive(tmp_path, without_faults)


def job_with(recipe: str, *options: str) -> Callable[..., ElasticJob]:
    """Return what starts jobs of `tests.ranks.test_faults` with another recipe and more options."""

    def start_job(folder: Path, hosts: str, *given: str, **more: Any) -> ElasticJob:
        return ElasticJob(folder, hosts, *given, *options, "--checkpoint-every", "2", recipe=recipe, **more)

    return start_job


def test_mirrors_are_for_sharded_optimizers_and_needed_in_elastic_runs() -> None:
    with pytest.raises(UserError, match="--mirror 0 with --shard optimizer: a rank that is lost would take its part"):
        check_elastic_options({"shard": "optimizer", "mirror": "0"})
    with pytest.raises(UserError, match="--shard optimizer with --compression int8: mirrors do not encode"):
        check_elastic_options({"shard": "optimizer", "compression": "int8"})
    check_elastic_options({"shard": "optimizer"})
    with pytest.raises(UserError, match="--mirror 1 without --shard optimizer"):
        make_run_options({"mirror": "1"})
