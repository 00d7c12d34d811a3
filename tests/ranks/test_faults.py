"""Faults of all kinds, in real elastic runs: each run ends with the mathematics of the run without a fault."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.ranks.disk import small_disk
from tests.ranks.elastic import LEASE, RECIPE, ElasticJob, losses, verify
from tests.ranks.harness import train
from tests.support.processes import kill_all

EPOCHS, STEPS = 6, 12  # an epoch's
OTHER_FAILURES = ["sleep 60", "echo '?!'", "true"]  # of a discovery script


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[float], dict[str, Any]]]:
    """The losses and the summary of the run without a fault, on one rank."""
    folder = tmp_path_factory.mktemp("reference")
    summary = train("alone", 1, RECIPE, folder / "run", "--pause", "0", "--log-every", "1", "--threads", "1")
    yield losses(folder / "run"), summary


def check(job: ElasticJob, reference: tuple[list[float], dict[str, Any]]) -> None:
    """The run has made every step once, with the reference's losses and accuracy, and the ledger says so too."""
    expected, summary = reference
    found = losses(job.run_dir)
    assert len(found) == EPOCHS * STEPS
    np.testing.assert_allclose(found[: 2 * STEPS], expected[: 2 * STEPS], rtol=1e-5)
    assert abs(job.summary()["eval"]["accuracy"] - summary["eval"]["accuracy"]) <= 1.01 / 360
    assert job.summary()["samples_seen"] == summary["samples_seen"]
    verify(job.run_dir)


def test_workers_that_are_killed(tmp_path: Path, reference: Any) -> None:
    """One, rank 0, two at once, one that is stopped: the others go on, and each comes back."""
    with ElasticJob(tmp_path, "localhost:3", "--pause", "0.4") as job:
        job.step(5)
        job.kill(1)
        job.world(2)
        job.more(3)
        job.kill(0)
        job.more(3)
        job.world(3)
        job.more(2)
        job.kill(0, 1)
        job.world(1)
        job.more(3)
        job.kill(0, number=signal.SIGSTOP)
        job.world(3, 30 + LEASE)
        job.end()
    check(job, reference)
    assert job.summary()["membership_changes"] >= 4


@pytest.mark.slow
def test_all_workers_are_killed(tmp_path: Path, reference: Any) -> None:
    """They come back with the newest checkpoint."""
    with ElasticJob(tmp_path, "localhost:2", "--checkpoint-every", "7") as job:
        job.step(10)
        job.kill(0, 1)
        job.more(5)
        job.end()
    check(job, reference)


def test_hosts_come_and_go(tmp_path: Path, reference: Any) -> None:
    """Added, removed, both at once; one that cannot be reached harms nobody, nor does a clock that is set back."""
    env, set_clock_back = clock_of("127.0.0.1", tmp_path)
    with ElasticJob(tmp_path, "localhost:1", "--pause", "0.4", env=env) as job:
        job.step(3)
        job.hosts("localhost:1 127.0.0.1:1")
        job.world(2)
        set_clock_back()
        job.hosts("localhost:1 127.0.0.1:1 203.0.113.9:1")  # of a network that does not exist
        job.more(round(1.5 * LEASE / 0.4))
        assert job.said().count("world     ") == 1
        job.hosts("127.0.0.1:2")  # the first host goes, and in the same second the second grows
        job.until(lambda: job.said().count("world     ") > 1 and job.world_size() == 2, "other world of 2", hold=True)
        job.more(1)
        job.end()
    check(job, reference)


@pytest.mark.slow
def test_a_newcomer_that_became_first_is_removed(tmp_path: Path, reference: Any) -> None:
    """It leads the rounds in which horovodrun's list is asked for, and has begun to ask later than the others."""
    with ElasticJob(tmp_path, "localhost:1", "--pause", "0.4") as job:
        job.step(3)
        job.hosts("localhost:2")
        job.world(2)
        job.kill(0)
        job.world(1)
        job.world(2)
        job.more(2)
        job.hosts("localhost:1")
        job.world(1)
        job.end()
    check(job, reference)


def clock_of(host: str, folder: Path) -> tuple[dict[str, str], Callable[[], None]]:
    """An environment in which a host's workers and supervisors have a clock of their own; what sets that back."""
    preload, switch = folder / "clock.so", folder / "set-back"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", preload, Path(__file__).with_name("clock.c"), "-ldl"], check=True)
    env = {"LD_PRELOAD": str(preload), "HVDTRAIN_TEST_CLOCK": str(switch), "HVDTRAIN_TEST_CLOCK_HOST": host}

    def set_back() -> None:
        switch.touch()
        here = {**os.environ, **env, "HOROVOD_HOSTNAME": host}
        told = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], env=here, capture_output=True)
        assert time.time() - float(told.stdout) > 3500, told.stderr

    return env, set_back


def test_a_notice_costs_no_step(tmp_path: Path, reference: Any) -> None:
    """SIGTERM to all of a slot: its rank leaves at the end of the step, and the others have lost nothing."""
    with ElasticJob(tmp_path, "localhost:2 127.0.0.1:1") as job:
        job.step(8)
        leaving = job.worker(2).pid
        supervisor = job.supervisor(2)
        supervisor.send_signal(signal.SIGTERM)
        job.world(2)
        job.more(3)
        job.until(lambda: not psutil.pid_exists(leaving), "end of the worker that left")  # which its supervisor reaps
        # One slot of two: its host's other one goes on undisturbed.
        job.supervisor(1).send_signal(signal.SIGTERM)
        job.world(1)
        stays = job.worker(0)
        job.more(10)
        assert stays.is_running() and job.worker(0) == stays
        job.end()
    check(job, reference)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.6])
def test_a_notice_just_before_the_end(tmp_path: Path, reference: Any, seconds: float) -> None:
    """What a slot that leaves by itself ends with is horovodrun's failure only if the run ends in the same round."""
    with ElasticJob(tmp_path, "localhost:1 127.0.0.1:1") as job:
        job.step(8)
        job.supervisor(1).send_signal(signal.SIGTERM)
        time.sleep(seconds)
        job.end()
    check(job, reference)


@pytest.mark.slow
def test_too_few_would_be_left(tmp_path: Path, reference: Any) -> None:
    """All save and end with 75; resumed, the run goes on as if nothing had been."""
    with ElasticJob(tmp_path, "localhost:2", least=2, launch=[]) as job:
        job.step(5)
        job.those(is_supervisor)[0].send_signal(signal.SIGTERM)
        job.end(75)
    steps = len(losses(job.run_dir))
    assert steps < EPOCHS * STEPS
    with ElasticJob(tmp_path, "localhost:2", "--resume", least=2, launch=[]) as job:
        job.end()
    check(job, reference)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["notice", "stop"])
def test_a_stop_while_too_few_are_left(tmp_path: Path, reference: Any, by: str) -> None:
    """The one that waits for others with the state makes one more step alone, and saves."""
    with ElasticJob(tmp_path, "localhost:1 127.0.0.1:1", least=2, launch=[]) as job:
        job.step(8)
        stays, dies = job.those(is_supervisor)
        worker = dies.children()[0]
        kill_all([dies, worker])  # a worker may end by itself with its supervisor
        job.until(lambda: job.stands_still(2), "wait for others")
        done = job.done()
        if by == "notice":
            stays.send_signal(signal.SIGTERM)
        else:
            job.process.send_signal(signal.SIGINT)
        job.end(75, timeout=25)
    assert len(losses(job.run_dir)) == done + 1
    with ElasticJob(tmp_path, "localhost:2", "--resume", least=2, launch=[]) as job:
        job.end()
    check(job, reference)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_notices_to_both_slots_of_the_only_host(tmp_path: Path, reference: Any) -> None:
    """The slot that is done waits for the other's step, of 6 s: when it ends, horovodrun ends its host within 5 s."""
    with ElasticJob(tmp_path, "localhost:2", "--checkpoint-every", "1000", launch=[]) as job:
        job.step(8)
        first, second = job.those(is_supervisor)
        second.send_signal(signal.SIGTERM)
        job.until(lambda: not second.children(), "leaving")
        job.fault.write_text("slow")
        job.until(lambda: job.stands_still(1), "slow step")
        done = job.done()
        first.send_signal(signal.SIGTERM)
        job.end(75, hurry=False)
    # The step that was under way, or the one after it, if it had told already.
    assert done < len(losses(job.run_dir)) <= done + 2
    job.fault.unlink()
    with ElasticJob(tmp_path, "localhost:2", "--resume", launch=[]) as job:
        job.end()
    check(job, reference)


@pytest.mark.slow
def test_a_driver_that_says_nothing_for_a_while(tmp_path: Path, reference: Any) -> None:
    """Longer than a request to it waits; it takes more than one without an answer to end the run."""
    with ElasticJob(tmp_path, "localhost:2", "--pause", "0.4") as job:
        job.step(8)
        job.process.send_signal(signal.SIGSTOP)
        time.sleep(11)
        job.process.send_signal(signal.SIGCONT)
        job.more(10)
        job.end()
    check(job, reference)


def is_supervisor(process: psutil.Process) -> bool:
    env = process.environ()
    return (
        "HOROVOD_RANK" in env and "HVDTRAIN_MEMBER" not in env and process.cmdline()[1:4] == ["-m", "hvdtrain", "train"]
    )


@pytest.mark.slow
def test_an_error_that_does_not_come_again(tmp_path: Path, reference: Any) -> None:
    with ElasticJob(tmp_path, "localhost:2") as job:
        job.step(5)
        job.fault.write_text("score-once")
        job.end()
    check(job, reference)


def test_an_error_that_comes_again_ends_the_run_with_it(tmp_path: Path) -> None:
    with ElasticJob(tmp_path, "localhost:2", launch=["--relaunch", "3"]) as job:
        job.step(5)
        job.fault.write_text("score-always")
        job.end(1)
    assert "a fault on purpose, always" in job.said()
    assert "relaunch" not in job.said()


@pytest.mark.slow
def test_newcomers_that_crash_or_hang(tmp_path: Path, reference: Any) -> None:
    """While they start, twice as many steps are made as they would need; the run does not wait for them."""
    with ElasticJob(tmp_path, "localhost:2", "--pause", "0.2") as job:
        job.step(3)
        job.fault.write_text("init-crash")
        job.hosts("localhost:2 127.0.0.1:1")
        job.more(10)
        job.fault.write_text("init-hang")
        job.hosts("localhost:2 127.0.0.2:1")
        job.end()
    check(job, reference)


@pytest.mark.slow
def test_a_driver_that_is_killed(tmp_path: Path, reference: Any) -> None:
    """`hvdtrain launch` starts the job again from its newest checkpoint."""
    with ElasticJob(tmp_path, "localhost:2", "--checkpoint-every", "5", launch=["--relaunch", "2"]) as job:
        job.step(8)
        job.those(lambda process: "bin/horovodrun" in " ".join(process.cmdline()[:2]))[0].kill()
        job.end()
    assert "relaunch 1 of 2" in job.said()
    check(job, reference)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit 1", *OTHER_FAILURES])
def test_a_discovery_script_that_fails(tmp_path: Path, reference: Any, how: str) -> None:
    """By an error, without an end, with junk, with nothing: what it last said stands."""
    with ElasticJob(tmp_path, "localhost:2", launch=[]) as job:
        job.step(3)
        script = tmp_path / "discover.sh"
        script.write_text(f"#!/bin/sh\n{how}\n")
        job.more(10)
        job.kill_any()
        job.end()
    check(job, reference)


@pytest.mark.slow
def test_survivors_wait_until_they_are_enough(tmp_path: Path, reference: Any) -> None:
    """Below --min-np nothing is trained, and nothing lost: the one that is left holds the state."""
    with ElasticJob(tmp_path, "localhost:2", least=2) as job:
        job.step(5)
        job.kill(1)
        job.until(lambda: job.said().count("world     2 ranks") == 1, "a second world")
        job.end()
    assert "world     1 rank" not in job.said()
    check(job, reference)


@pytest.mark.slow
def test_a_slot_that_cannot_be_filled_at_the_start(tmp_path: Path, reference: Any) -> None:
    """The others begin when horovodrun has given it up, and not when their patience ends."""
    with ElasticJob(tmp_path, "localhost:2 127.0.0.2:1") as job:  # where no sshd listens
        job.step(1)
        assert re.search(r"Process \d exit with status code 255", job.said())  # horovodrun takes hosts in any order
        job.end()
    check(job, reference)


@pytest.mark.slow
def test_a_notice_while_the_others_regroup(tmp_path: Path, reference: Any) -> None:
    """A worker is killed, another slot is told to go in the same moment, and its supervisor is killed for good."""
    with ElasticJob(tmp_path, "localhost:1 127.0.0.1:2", "--pause", "0.2") as job:
        job.step(5)
        # The last rank is alone on its host, which horovodrun takes out with it.
        last = job.supervisor(2)
        job.kill(0)
        last.send_signal(signal.SIGTERM)
        job.more(5)
        kill_all([last])  # it may have left by now
        job.more(3)
        job.end()
    check(job, reference)


def test_the_same_bits_through_a_fault(tmp_path: Path) -> None:
    """With --deterministic the weights at the end are those of one rank that nothing happened to."""
    deterministic = ["--deterministic", "--virtual-shards", "6", "--epochs", "3"]
    train("alone", 1, RECIPE, tmp_path / "alone", "--pause", "0", *deterministic)
    (tmp_path / "elastic").mkdir()
    with ElasticJob(tmp_path / "elastic", "localhost:3", *deterministic) as job:
        job.step(4)
        job.kill(0)
        job.end()
    assert job.summary()["membership_changes"] >= 1
    states = [
        torch.load(folder / "checkpoints" / "step-36" / "state", weights_only=True)["model"]
        for folder in (tmp_path / "alone", job.run_dir)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*(s.values() for s in states), strict=True))


@pytest.mark.slow
def test_compression_through_a_fault(tmp_path: Path, reference: Any) -> None:
    """What the lost rank had not sent is lost with it; the others keep theirs, and newcomers begin with none."""
    with ElasticJob(tmp_path, "localhost:3", "--compression", "int8,min=64", "--pause", "0.2") as job:
        job.step(20)
        job.kill(1)
        job.world(2)
        job.world(3)
        job.end()
    assert len(losses(job.run_dir)) == EPOCHS * STEPS
    assert job.summary()["eval"]["accuracy"] > reference[1]["eval"]["accuracy"] - 0.05
    verify(job.run_dir)


@pytest.mark.slow
def test_a_failure_in_the_last_checkpoint(tmp_path: Path, reference: Any) -> None:
    """Those that are left have no step to make, and still evaluate and save."""
    with ElasticJob(tmp_path, "localhost:2", "--checkpoint-every", "1000") as job:
        job.step(5)
        job.fault.write_text("sync-crash")
        job.end()
    check(job, reference)
    assert job.summary()["membership_changes"] >= 1
    assert (job.run_dir / "checkpoints" / f"step-{EPOCHS * STEPS}" / "meta.json").exists()


@pytest.mark.slow
def test_a_failure_while_the_state_is_handed_over(tmp_path: Path, reference: Any) -> None:
    """The rank that gives it dies; later one that takes it, while it waits for it."""
    with ElasticJob(tmp_path, "localhost:3", "--pause", "0.4", "--checkpoint-every", "1000") as job:
        job.step(3)
        job.fault.write_text("sync-crash")
        job.kill(1)
        job.until(lambda: not job.fault.exists(), "failure in the hand-over")
        job.world(1)
        job.fault.write_text("sync-wait")  # when others join
        job.until(lambda: not job.fault.exists(), "hand-over")
        gives = job.worker(0)
        job.those(lambda process: "HVDTRAIN_MEMBER" in process.environ() and process != gives)[0].kill()
        job.end()
    check(job, reference)


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path, reference: Any) -> None:
    """Checkpoints fail and rows wait, also where another rank becomes rank 0; with room again all is written."""
    with (
        small_disk(tmp_path / "run", 2) as disk,
        ElasticJob(tmp_path, "localhost:2", "--checkpoint-every", "4", "--pause", "0.2") as job,
    ):
        job.step(6)
        disk.fill()
        job.until(lambda: "cannot write step 12's checkpoint" in job.said(), "second failed checkpoint")
        job.kill(0)
        job.until(lambda: "cannot write step 20's checkpoint" in job.said(), "failed checkpoint of another rank")
        assert not list(job.run_dir.glob("**/.*"))
        disk.empty()
        job.until(lambda: "has free space again" in job.said(), "rows that were waiting")
        job.end()
        check(job, reference)
        assert re.search(r"No space left on device \(\d+ KiB free\); training continues", job.said())
        assert "rows wait in memory" in job.said()
