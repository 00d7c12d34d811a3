"""Who hangs: what a rank's watcher notices, and the line that launch makes of all ranks' reports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from hvdtrain.launch.outcome import determine_outcome
from hvdtrain.launch.report import JobReport
from hvdtrain.launch.standstill import describe_process_state, describe_standstill
from hvdtrain.system import activity
from hvdtrain.system.activity import HangWatcher, Standstill
from hvdtrain.system.messages import RankFailed, RankStandstill, RankStarted, message_fields, parse_message
from tests.support.limits import stretch

LOADS = Standstill("loading its batch", "", "m.py:7 in item", 12, 61.2, False)
WAITS = Standstill("exchanging gradients", "gradients.0", "", 12, 60.9, True)
SCORE = Standstill("computing gradients", "mean", "m.py:9 in score", 12, 60.0, True)
EVALUATES = Standstill("evaluating", "", "", 12, 0.1, False)


@pytest.mark.parametrize(
    ("reports", "silent", "line"),
    [
        (
            {"rank 0 on a": WAITS, "rank 1 on b": LOADS, "rank 2 on c": WAITS},
            {},
            "rank 1 on b has been loading its batch (step 12, m.py:7 in item) for 61 s; the others wait for it "
            "while exchanging gradients (step 12, collective 'gradients.0')",
        ),
        (
            {"rank 0 on a": WAITS, "rank 2 on c": WAITS},
            {"rank 1 on b": "it is stopped by a signal"},
            "rank 1 on b does not report what it does: it is stopped by a signal; the others wait for it "
            "while exchanging gradients (step 12, collective 'gradients.0')",
        ),
        (
            {"rank 0 on a": SCORE, "rank 1 on b": WAITS},
            {},
            "rank 0 on a has waited for 60 s while computing gradients (step 12, collective 'mean', m.py:9 in score), "
            "rank 1 on b has waited for 61 s while exchanging gradients (step 12, collective 'gradients.0'): "
            "they wait for each other",
        ),
        # Uneven parts: one still works, one batch after the other.
        (
            {"rank 0 on a": WAITS, "rank 1 on b": EVALUATES},
            {},
            "rank 1 on b is evaluating (step 12); rank 0 on a waits for it "
            "while exchanging gradients (step 12, collective 'gradients.0')",
        ),
        # A long evaluation of all, and a step that is only slow.
        ({"rank 0 on a": EVALUATES, "rank 1 on b": EVALUATES}, {}, ""),
        (
            {"rank 0 on a": LOADS},
            {},
            "rank 0 on a has been loading its batch (step 12, m.py:7 in item) for 61 s",
        ),
    ],
)
def test_standstill_line_names_hung_and_waiting_ranks(
    reports: dict[str, Standstill], silent: dict[str, str], line: str
) -> None:
    assert describe_standstill(reports, silent, 45.0) == line


def message(rank: int, stands: Standstill) -> RankStandstill:
    return RankStandstill(rank, f"h{rank}", 10 + rank, **asdict(stands), after=45.0)


def test_what_ranks_report_is_put_together_once() -> None:
    report = JobReport(["h0", "h1", "h2"])
    for rank in range(3):
        report.add_message(RankStarted(rank, f"h{rank}", 10 + rank))
    assert message(1, LOADS).standstill() == LOADS
    report.add_message(message(1, LOADS))
    report.add_message(message(0, WAITS))
    assert report.standstill_due is not None
    # Rank 2 has not said that it waits: it is not counted among those that do.
    assert report.summarize_standstill().startswith("rank 1 on h1 has been loading its batch (step 12, m.py:7 in item)")
    assert report.standstill_due is None and report.summarize_standstill() == ""
    # Those that wait end as well; they are not the cause.
    for rank in (0, 2):
        report.add_message(RankFailed(rank, f"h{rank}", error="it hangs", waits=True))
    code, text = determine_outcome(report, "horovodrun", 1)
    assert code == 1 and text.startswith("error: rank 1 on h1 has been loading its batch (step 12")


class Watched:
    """A watcher that is only looked by, not left alone; and what it has said."""

    def __init__(self, limit: float) -> None:
        self.notices: list[Standstill] = []
        self.ends: list[Standstill] = []
        self.watcher = HangWatcher(lambda stands, _: self.notices.append(stands), self.ends.append, limit)
        self.watcher.stop_watching()

    def seconds(self, count: int) -> None:
        for _ in range(count):
            self.watcher.check_activity(1.0)


@pytest.fixture
def watched() -> Iterator[Watched]:
    activity.enter_activity("testing")
    yield Watched(limit=100)
    activity.enter_activity("testing")


def test_a_step_that_is_not_made_is_noticed_again_and_again(watched: Watched) -> None:
    activity.begin_training(11)
    activity.record_finished_steps(12)
    activity.enter_activity("loading its batch")
    watched.seconds(44)
    assert watched.notices == []
    watched.seconds(50)
    assert [(stands.what, stands.step, stands.waits) for stands in watched.notices] == 2 * [
        ("loading its batch", 13, False)
    ]
    assert "test_standstill.py" in watched.notices[0].where
    activity.record_finished_steps(13)
    activity.enter_activity("loading its batch")
    watched.seconds(40)
    assert len(watched.notices) == 2 and watched.ends == []


def test_a_slow_step_among_slow_steps_is_not_noticed(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    activity.begin_training(0)
    now = time.monotonic()
    for step in range(1, 4):
        monkeypatch.setattr("time.monotonic", lambda step=step: now + 30 * step)
        activity.record_finished_steps(step)
    monkeypatch.undo()
    activity.enter_activity("computing gradients")
    watched.seconds(299)
    assert watched.notices == [] and watched.ends == []
    watched.seconds(3)
    assert len(watched.notices) == 1 and len(watched.ends) >= 1


@pytest.mark.parametrize(("waits", "patient", "seconds"), [(False, False, 100), (True, False, 300), (False, True, 300)])
def test_when_a_rank_that_hangs_is_ended(watched: Watched, waits: bool, patient: bool, seconds: int) -> None:
    activity.begin_training(0)
    activity.record_finished_steps(1)
    activity.enter_activity("what it does", waits=waits, patient=patient)
    watched.seconds(seconds)
    assert watched.ends == []
    watched.seconds(2)
    assert watched.ends[0].waits == waits and watched.ends[0].seconds >= seconds


def test_the_first_step_has_more_time_and_some_things_have_no_limit(watched: Watched) -> None:
    activity.begin_training(0)
    activity.enter_activity("computing gradients")
    watched.seconds(299)
    assert watched.ends == []
    activity.enter_activity("waiting for enough ranks", waits=True, endless=True)
    watched.seconds(2000)
    assert watched.ends == []


def test_batch_after_batch_is_not_a_standstill(watched: Watched) -> None:
    activity.begin_training(0)
    activity.record_finished_steps(1)
    for _ in range(60):
        activity.enter_activity("evaluating")
        watched.seconds(5)
    assert watched.ends == [] and all(stands.seconds < 10 for stands in watched.notices)


def test_time_in_a_debugger_does_not_count(watched: Watched) -> None:
    activity.begin_training(0)
    activity.record_finished_steps(1)
    activity.enter_activity("computing gradients")
    code = compile("def prompt(seconds):\n    seconds(500)\n", "/usr/lib/python3/pdb.py", "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    scope["prompt"](watched.seconds)
    assert watched.notices == [] and watched.ends == []


def test_the_watcher_wakes_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVDTRAIN_HANG_NOTICE", "0.1")
    noticed = threading.Event()
    activity.begin_training(0)
    watcher = HangWatcher(lambda stands, after: noticed.set(), lambda stands: None, 0)
    try:
        assert noticed.wait(stretch(30))
    finally:
        watcher.stop_watching()


def test_what_a_worker_was_in_can_be_read_when_it_is_dead(tmp_path: Any) -> None:
    with (tmp_path / "record").open("wb+") as file:
        activity.ActivityRecord(file.fileno()).write_activity(7, 12, 600.0, "loading its batch")
        assert activity.ActivityRecord(file.fileno()).read_activity() == (7, 12, 600.0, "loading its batch")


def test_what_ranks_and_supervisors_send_is_valid_to_launch() -> None:
    def is_valid_message(content: dict[str, Any]) -> bool:
        return parse_message(json.dumps(content), "") is not None

    sent = message_fields(message(1, LOADS))
    assert is_valid_message(sent)
    assert not is_valid_message({**sent, "seconds": "61"}) and not is_valid_message({**sent, "waits": 1})
    started = {"kind": "started", "rank": 1, "host": "b", "pid": 7, "size": 2, "reach": "b", "supervisor": 6}
    assert is_valid_message(started) and not is_valid_message({**started, "supervisor": 1})
    assert is_valid_message({"kind": "failed", "rank": 1, "host": "b", "pid": 7, "error": "it hangs", "waits": True})
    assert is_valid_message({"kind": "failed", "rank": 1, "host": "b", "pid": 7, "error": "no progress", "ends": True})


def test_a_rank_that_was_killed_is_not_taken_for_one_that_hangs() -> None:
    """It is a zombie until the launcher, which says by what it died, has looked at it."""
    with subprocess.Popen(["true"]) as rank, subprocess.Popen(["sleep", "60"]) as stopped:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
        assert describe_process_state(socket.gethostname(), rank.pid) == ""
        stopped.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        assert describe_process_state(socket.gethostname(), stopped.pid) == "it is stopped by a signal"
        stopped.kill()
