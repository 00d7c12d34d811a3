"""Which signals stop a run, and which of them are the same stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from hvdtrain.elastic.membership import FixedMembership
from hvdtrain.launch.job import Job, JobSpec
from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.report import JobReport
from hvdtrain.launch.run import handle_job_signal
from hvdtrain.launch.signals import RequeueRequest, catch_stop_signals
from hvdtrain.system.errors import EXIT_REQUEUE, RequeueExit
from hvdtrain.system.messages import RankStarted
from hvdtrain.training.stop import StopRequest
from tests.support.limits import stretch


@pytest.fixture
def hangup() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_for_a_stop(hangup: None, number: int) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with StopRequest(FixedMembership()) as stop:
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_nohup_lets_a_training_outlive_its_terminal(hangup: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(FixedMembership()) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    with catch_stop_signals() as inbox:
        signal.raise_signal(signal.SIGHUP)
        assert not inbox.received


def test_the_terminal_that_is_closed_reaches_launch(hangup: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with catch_stop_signals() as inbox:
        signal.raise_signal(signal.SIGHUP)
        assert list(inbox.received) == [signal.SIGHUP]


def test_signals_within_a_second_are_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with StopRequest(FixedMembership()) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        monkeypatch.setattr("time.monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_launch_takes_signals_within_a_second_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.monotonic()
    with subprocess.Popen(["sleep", "60"]) as rank, subprocess.Popen(["true"], stdout=subprocess.PIPE) as guard:
        spec = JobSpec(launcher=LAUNCHERS.get("horovodrun"), command_line=["true"], environ={})
        job = Job(spec, guard, JobReport(["localhost"]), mark="")
        job.report.add_message(RankStarted(0, os.uname().nodename, rank.pid))
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            handle_job_signal(job, number)
        assert job.stop_signal == signal.SIGTERM and not job.terminated
        assert rank.wait(stretch(10)) == -signal.SIGTERM
        monkeypatch.setattr("hvdtrain.launch.run.time.monotonic", lambda: now + 60)
        handle_job_signal(job, signal.SIGTERM)
        assert job.terminated
    assert capsys.readouterr().err.count("stopping: ranks finish the step and save") == 1


def test_a_batch_systems_signal_is_not_lost_in_an_import_that_swallows_it() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(RequeueExit) as left, RequeueRequest() as request:
        request.raise_if_received()
        with contextlib.suppress(BaseException):  # as some libraries do around an optional import
            signal.raise_signal(signal.SIGUSR1)
        request.raise_if_received()
    assert left.value.code == EXIT_REQUEUE
    assert signal.getsignal(signal.SIGUSR1) == before
