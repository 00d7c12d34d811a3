"""A parameter server in elastic runs: workers are lost and join without a pause, and a lost server is replaced."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.ledger.verify import verify_ledger
from tests.ranks.elastic import RECIPE, ElasticJob, losses
from tests.ranks.harness import HVDTRAIN, rows, run
from tests.support.worlds import KeptWorld
from tests.support.worlds import train as train_on

OPTIONS = ["--epochs", "2", "--batch-size", "120", "--lr", "0.02"]  # 24 steps


def start(folder: Path, staleness: str, *options: str, slots: int = 3, least: int = 2) -> ElasticJob:
    """One server, and as many workers as there are other slots."""
    given = ["--pause", "0.4", "--server", "1", "--staleness", staleness, *OPTIONS, *options]
    return ElasticJob(folder, f"localhost:{slots}", *given, least=least, most=slots)


def find_server(job: ElasticJob) -> int:
    """The process that has last said that it is rank 0."""
    found: list[int] = [message["pid"] for message in job.messages("started") if message["rank"] == 0]
    return found[-1]


def check_ledger(run_dir: Path) -> None:
    """Each item was applied once, and the weights are those that a replay makes."""
    done = run("alone", 1, [*HVDTRAIN, "ledger", "verify", "--replay", str(run_dir)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exactly once: 2 epochs" in done.stdout and "to the same bits" in done.stdout


def test_a_lost_worker_holds_up_nobody_and_another_one_joins(world1: KeptWorld, tmp_path: Path) -> None:
    """Synchronous: the other worker computes its items, and the losses are those of the plain run."""
    with start(tmp_path, "sync") as job:
        job.world(3)
        job.step(3)
        job.kill(2)
        job.world(2)
        job.more(2)
        job.world(3)
        job.more(1)
        job.end()
    assert job.summary()["resumed_from"] is None  # the server has kept its weights
    found = verify_ledger(job.run_dir)
    assert found.is_exactly_once and found.epochs == 2 and found.steps == 24
    plain = tmp_path / "plain"
    train_on(world1, RECIPE, plain, "--pause", "0", "--log-every", "1", "--threads", "1", *OPTIONS)
    np.testing.assert_allclose(losses(job.run_dir), losses(plain), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("staleness", ["backup:1", "bounded:1", "async+dc"])
def test_workers_come_and_go_with_every_policy(tmp_path: Path, staleness: str) -> None:
    with start(tmp_path, staleness, slots=4) as job:
        job.world(4)
        for victims in ((1,), (2, 3)):
            job.more(3)
            job.kill(*victims)
            job.world(4 - len(victims))
            job.world(4)
        job.end()
    check_ledger(job.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("when", [2, 8])
def test_a_lost_server_is_replaced_from_the_newest_checkpoint(tmp_path: Path, when: int) -> None:
    """Before the first checkpoint and after it; the dead one's next process is a worker."""
    with start(tmp_path, "async", "--checkpoint-every", "6") as job:
        job.world(3)
        job.step(when)
        server = find_server(job)
        job.kill(0)
        job.until(lambda: find_server(job) != server, "another server", hold=True)
        job.more(2)
        job.world(3)
        job.end()
    check_ledger(job.run_dir)
    steps = [row["step"] for row in rows(job.run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert (job.summary()["resumed_from"] or 0) >= (6 if when > 6 else 0)


@pytest.mark.slow
def test_a_server_that_is_asked_to_leave_saves_and_is_replaced_at_that_version(tmp_path: Path) -> None:
    with start(tmp_path, "bounded:2") as job:
        job.world(3)
        job.step(4)
        server = find_server(job)
        job.kill(0, number=signal.SIGTERM)
        job.until(lambda: find_server(job) != server, "another server", hold=True)
        job.end()
    assert job.summary()["resumed_from"] >= 4
    check_ledger(job.run_dir)


@pytest.mark.slow
def test_a_stopped_run_is_resumed_by_any_launcher(tmp_path: Path) -> None:
    with start(tmp_path, "async") as job:
        job.world(3)
        job.step(4)
        job.supervisor(1).send_signal(signal.SIGUSR1)
        job.finish()
    assert not job.summary()["finished"]
    resume(job)


@pytest.mark.slow
def test_a_server_without_enough_workers_saves_when_it_is_asked_to_leave(tmp_path: Path) -> None:
    with start(tmp_path, "async", slots=2) as job:
        job.world(2)
        job.step(4)
        job.supervisor(1).send_signal(signal.SIGTERM)
        job.world(1)
        done = job.done()
        job.supervisor(0).send_signal(signal.SIGTERM)
        job.finish()
    resume(job)
    assert job.summary()["resumed_from"] == done


def resume(job: ElasticJob) -> None:
    """Resume a run under plain horovodrun, and let it finish."""
    resumed = ["--pause", "0", "--resume", "--run-dir", str(job.run_dir)]
    done = run("horovodrun", 3, [*HVDTRAIN, "train", RECIPE, *resumed])
    assert done.returncode == 0, done.stdout + done.stderr
    check_ledger(job.run_dir)
