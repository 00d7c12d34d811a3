"""Which rank is blamed for the end of a run."""

from __future__ import annotations

import pytest

from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.outcome import determine_elastic_outcome, determine_outcome
from hvdtrain.launch.output import OutputLine
from hvdtrain.launch.report import JobReport
from hvdtrain.system.messages import RankFailed, RankFinished, RankMessage, RankStarted

HOROVODRUN = LAUNCHERS.get("horovodrun")


def started(rank: int, size: int | None = None) -> RankStarted:
    return RankStarted(rank, f"h{rank}", 100 + rank, size)


def finished(rank: int, code: int = 0) -> RankFinished:
    return RankFinished(rank, code)


def lost(rank: int) -> RankFailed:
    return RankFailed(rank, f"h{rank}", 100 + rank, error="HorovodInternalError: shut down")


def report_of(*messages: RankMessage, launcher: str = "", hosts: int = 3) -> JobReport:
    report = JobReport([f"h{rank}" for rank in range(hosts)], HOROVODRUN.output)
    for message in messages:
        report.add_message(message)
    for line in launcher.splitlines():
        report.hold_line(OutputLine(None, "stderr", line))
    return report


ALL = (started(0), started(1), started(2))
VANISHED = "error: rank 1 on h1 ended with code 0 and no message before it had finished"


@pytest.mark.parametrize(
    ("report", "code", "expected"),
    [
        # os._exit(0): no launcher reports it; rank 2 was ended by the launcher.
        (
            report_of(*ALL, lost(0), launcher="Process 2 exit with status code 143."),
            1,
            f"{VANISHED}\n(1 other rank ended with it)",
        ),
        (report_of(*ALL, lost(0), lost(2)), 1, f"{VANISHED}\n(2 other ranks ended with it)"),
        (report_of(*ALL, finished(0), finished(2)), 0, VANISHED),
        # One with a code of its own comes first.
        (
            report_of(*ALL, lost(0), launcher="Process 2 exit with status code 5."),
            1,
            "error: rank 2 on h2 ended with code 5 and no message\n(1 other rank ended with it)",
        ),
        (
            report_of(
                *ALL,
                launcher="prterun has exited due to process rank 1 with PID 7 on node vm exiting\nimproperly. There",
            ),
            1,
            VANISHED,
        ),
    ],
)
def test_a_rank_that_vanished_comes_before_those_that_lost_it(report: JobReport, code: int, expected: str) -> None:
    assert determine_outcome(report, "horovodrun", code) == (1, expected)


def test_a_run_is_over_when_all_its_ranks_have_finished() -> None:
    report = report_of(*ALL, finished(0), finished(2))
    assert report.all_finished_at is None
    report.add_message(finished(1))
    assert report.all_finished_at is not None


def test_a_failure_at_the_end_of_an_elastic_run_beats_the_others_finish() -> None:
    report = JobReport([])
    for rank in range(2):
        report.add_message(started(rank, size=2))
    report.add_message(finished(1))
    error = "cannot write summary.json in run: Permission denied"
    report.add_message(RankFailed(0, "h0", 100, error=error))
    assert determine_elastic_outcome(report, "horovodrun", 0) == (1, f"error: rank 0 on h0 failed: {error}")
