"""What the launchers print, taken apart, and the verdict on it."""

import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import replace

import pytest

from hvdtrain.launch.job import Job, JobSpec, pop_unreachable_hosts
from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.outcome import determine_outcome
from hvdtrain.launch.output import OutputLine, OutputParser, RankExit, find_rank_exits
from hvdtrain.launch.report import JobReport
from hvdtrain.launch.run import handle_line, handle_message, is_of_this_launch
from hvdtrain.system.messages import RankFailed, RankFinished, RankMessage, RankReport, RankStarted, message_fields
from hvdtrain.system.processes import Child, Deadline
from hvdtrain.system.strict_json import encode_json
from tests.support.limits import stretch


def job_of(guard: subprocess.Popen[bytes], hosts: Sequence[str] = (), *, elastic: bool = False) -> Job:
    """A job of ranks on some hosts, or of elastic ones on host a, as if `guard` ran it."""
    horovodrun = LAUNCHERS.get("horovodrun")
    listed = (lambda: ["a"]) if elastic else None
    spec = JobSpec(launcher=horovodrun, command_line=["true"], environ={}, list_hosts=listed)
    return Job(spec, guard, JobReport(hosts, horovodrun.output), "#")


def lines(*chunks: bytes, stream: str = "stdout") -> list[OutputLine]:
    parser = OutputParser(stream)
    return [line for chunk in (*chunks, b"") for line in parser.parse_bytes(chunk)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[0]<stdout>:text\n", [(0, "stdout", "text")]),
        (b"[12]<stderr>: indented\n", [(12, "stderr", " indented")]),
        (b"[1,0]<stdout>: text\n", [(0, "stdout", "text")]),
        (b"[1,3]<stderr>:  indented\n", [(3, "stderr", " indented")]),
        (b"[prterun-vm-12@1,3]<stdout>: text\n", [(3, "stdout", "text")]),
        (b"[0]<stdout>:\n[0]<stdout>:\n", [(0, "stdout", ""), (0, "stdout", "")]),
        (b"Process 1 exit with status code 1.\n", [(None, "stdout", "Process 1 exit with status code 1.")]),
        (b"[0] looks like one\n", [(None, "stdout", "[0] looks like one")]),
        (b"[0]<stdout>:caf\xc3\xa9 \xff\n", [(0, "stdout", "café \N{REPLACEMENT CHARACTER}")]),
        (b"[0]<stdout>:no end", [(0, "stdout", "no end")]),
        # horovodrun repeats the prefix after a carriage return, and does not end the line.
        (
            b"[1]<stdout>:\r[0]<stdout>:\r[0]<stdout>:10%\r[1]<stdout>:10%\r[0]<stdout>:\n[1]<stdout>:x\n",
            [(0, "stdout", "10%"), (1, "stdout", "10%"), (1, "stdout", "x")],
        ),
        # mpirun does not.
        (
            b"[1,1]<stdout>: \r10%\r20%\r\nlauncher\n",
            [(1, "stdout", "10%"), (1, "stdout", "20%"), (None, "stdout", "launcher")],
        ),
    ],
)
def test_output_is_split_into_lines_whole_or_byte_by_byte(
    data: bytes, expected: list[tuple[int | None, str, str]]
) -> None:
    whole = [OutputLine(*line) for line in expected]
    assert lines(data) == whole
    assert lines(*(data[at : at + 1] for at in range(len(data)))) == whole


def test_a_line_without_end_is_not_searched_again_and_again() -> None:
    parser = OutputParser("stdout")
    for _ in range(2000):
        assert list(parser.parse_bytes(b"x" * 10_000)) == []
    (line,) = parser.parse_bytes(b"\n")
    assert len(line.text) == 20_000_000


def test_srun_pieces_are_joined_to_lines() -> None:
    """It breaks a line after 1024 bytes, and gives each piece the rank's number."""
    parser = OutputParser("stderr", LAUNCHERS.get("srun").output)
    data = b" 0: a\n10: " + b"x" * 1024 + b"\n 0: \n10: y\nsrun: error: n1\n 0: 1: b\n10: " + b"z" * 1024 + b"\n"
    assert [*parser.parse_bytes(data), *parser.parse_bytes(b"")] == [
        OutputLine(0, "stderr", "a"),
        OutputLine(0, "stderr", ""),
        OutputLine(10, "stderr", "x" * 1024 + "y"),
        OutputLine(None, "stderr", "srun: error: n1"),
        OutputLine(0, "stderr", "1: b"),
        OutputLine(10, "stderr", "z" * 1024),
    ]


MPI_KILLED = """\
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 5630 on node vm exited on
signal 9 (Killed).
--------------------------------------------------------------------------"""
MPI_CODE = """\
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-5715@1,2]
   Exit code:    3"""
HOROVODRUN = """\
Process 1 exit with status code 137.
Terminating remaining workers after failure of Process 1.
Process 0 exit with status code 143.
Traceback (most recent call last):
RuntimeError: Horovod detected that one or more processes exited with non-zero status
Process name: 1
Exit code: 137"""

SRUN = """\
srun: error: n1: task 1: Segmentation fault (core dumped)
srun: launch/slurm: _step_signal: Terminating StepId=4.0
srun: error: n0: tasks 0,2: Terminated
srun: error: n2: tasks 3-4: Exited with exit code 2
srun: Force Terminated StepId=4.0"""


@pytest.mark.parametrize(
    ("launcher", "text", "expected"),
    [
        ("srun", SRUN, [RankExit(1, 139), RankExit(0, 143), RankExit(3, 2)]),
        ("mpirun", MPI_KILLED, [RankExit(1, 137)]),
        ("mpirun", MPI_CODE, [RankExit(2, 3)]),
        ("horovodrun", MPI_CODE, [RankExit(2, 3)]),  # with the MPI controller it starts mpirun
        ("horovodrun", HOROVODRUN, [RankExit(1, 137), RankExit(0, 143)]),
        ("srun", "", []),
    ],
)
def test_rank_exits_are_found_in_launcher_output(launcher: str, text: str, expected: list[RankExit]) -> None:
    assert find_rank_exits(text.splitlines(), LAUNCHERS.get(launcher).output) == expected


def failed(rank: int, error: str, code: int = 1, traceback: str = "") -> RankFailed:
    return RankFailed(rank, f"h{rank}", code=code, error=error, traceback=traceback)


BROKEN = failed(0, "HorovodInternalError: Horovod has been shut down.")


@pytest.mark.parametrize(
    ("said", "launcher", "code", "asked", "expected"),
    [
        ([RankFinished(0, 0), RankFinished(1, 0)], "", 0, None, (0, "")),
        ([], "", 0, None, (0, "")),
        ([RankFinished(0, 75), RankFinished(1, 75)], HOROVODRUN, 1, None, (75, "")),
        (
            [failed(1, "a"), failed(0, "b")],
            "",
            1,
            None,
            (1, "error: rank 1 on b failed: a\n(1 other rank ended with it)"),
        ),
        ([failed(1, "a", 2)], "", 1, None, (2, "error: rank 1 on b failed: a")),
        ([failed(0, "a", traceback="T\n  x\n")], "", 1, None, (1, "error: rank 0 on a failed: a\nT\n  x")),
        # The rank that lost another one may speak before the launcher notices the other's death ...
        (
            [BROKEN],
            HOROVODRUN,
            1,
            None,
            (
                1,
                "error: rank 1 on b was killed by signal 9 (SIGKILL); probably by the out-of-memory killer"
                "\n(1 other rank ended with it)",
            ),
        ),
        # ... or before the other rank says why.
        (
            [BROKEN, failed(1, "a")],
            HOROVODRUN,
            1,
            None,
            (1, "error: rank 1 on b failed: a\n(1 other rank ended with it)"),
        ),
        ([BROKEN], "", 1, None, (1, f"error: rank 0 on a failed: {BROKEN.error}")),
        ([], MPI_CODE, 3, None, (1, "error: rank 2 ended with code 3 and no message")),
        ([], "Process 0 exit with status code 2.", 1, None, (2, "error: rank 0 on a ended with code 2 and no message")),
        ([], "Process 0 exit with status code 75.", 1, None, (75, "")),
        ([], "help", 213, None, (1, "error: horovodrun ended with code 213; no rank reported why")),
        (
            [RankFinished(0, 0), RankFinished(1, 0)],
            "",
            1,
            None,
            (0, "warning: all ranks finished, and then horovodrun ended with code 1"),
        ),
        (
            [],
            "Process 0 exit with status code 143.",
            1,
            signal.SIGINT,
            (130, "rank 0 was stopped before training began: there was nothing to save"),
        ),
        (
            [],
            "Process 0 exit with status code 138.",
            1,
            signal.SIGUSR1,
            (75, "rank 0 was stopped before training began: there was nothing to save"),
        ),
    ],
)
def test_exit_code_and_text_name_the_first_failure(
    said: list[RankMessage], launcher: str, code: int, asked: int | None, expected: tuple[int, str]
) -> None:
    report = JobReport(["a", "b"], LAUNCHERS.get("horovodrun").output)
    for message in said:
        report.add_message(message)
    for line in launcher.splitlines():
        report.hold_line(OutputLine(None, "stderr", line))
    assert determine_outcome(report, "horovodrun", code, asked) == expected


def test_only_ranks_of_the_newest_generation_count_as_running() -> None:
    """The newest generation's ranks, whatever became of those before it; it is over when the last one has finished."""
    report = JobReport([])

    for rank in range(3):
        report.add_message(RankStarted(rank, "h", 10 + rank, size=3))
    report.add_message(RankFinished(2, 75))
    newcomer = RankFailed(0, "h", 13)
    assert report.is_from_newcomer(newcomer) and not report.is_from_newcomer(replace(newcomer, pid=10))
    assert report.running == {0, 1} and report.all_finished_at is None
    report.add_message(RankFinished(1, 75))
    report.add_message(RankFinished(0, 75))
    assert report.running == set() and report.all_finished_at is not None
    for rank in range(3):
        report.add_message(RankStarted(rank, "h", 20 + rank, size=3))
    assert report.all_finished_at is None
    report.add_message(RankFailed(0, "h", 20))
    assert len(report.failures) == 1
    # Ranks 0 and 2 are gone, and rank 1 goes on alone: what rank 0 failed of has not ended the run.
    report.add_message(RankStarted(0, "h", 21, size=1))
    assert report.failures == []
    assert report.running == {0} and report.started[0].pid == 21
    report.add_message(RankFinished(0, 0))
    assert report.all_finished_at is not None


def test_a_failure_that_the_others_outlive_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anybody has started it may be the run's; from then on it is a newcomer's."""
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as guard:
        job = job_of(guard, elastic=True)
        first = replace(failed(1, "no such file", 2), pid=5)
        handle_message(job, first)
        assert job.report.failures == [first] and capsys.readouterr().err == ""
        handle_message(job, RankStarted(0, "h0", 7, size=1))
        handle_message(job, replace(failed(0, "boom", traceback="where\n"), host="h2", pid=7))
        assert job.report.failures == []
    told = capsys.readouterr().err
    assert "a worker on h1 failed, the others continue: no such file\n" in told
    assert "a worker on h2 failed, the others continue: boom\nwhere\n" in told


def test_report_lines_have_no_label_and_a_rank_that_is_ended_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as guard:
        job = job_of(guard, ["a", "b"])
        sent = encode_json(message_fields(RankReport(0, "results   runs/1")))
        ended = OutputLine(1, "stderr", "Terminated")
        for line in (OutputLine(0, "stdout", f"#{sent}"), OutputLine(0, "stdout", "own"), ended):
            handle_line(job, line)
        job.report.add_message(failed(0, "boom"))
        handle_line(job, ended)
    assert capsys.readouterr() == ("results   runs/1\n[0] own\n", "[1] Terminated\n")


@pytest.mark.parametrize("elastic", [True, False])
def test_a_worker_that_comes_after_the_stop_hears_of_it(elastic: bool) -> None:
    with subprocess.Popen(["sleep", "60"]) as rank, subprocess.Popen(["true"], stdout=subprocess.PIPE) as guard:
        job = job_of(guard, elastic=elastic)
        job.stop_signal = signal.SIGINT
        handle_message(job, RankStarted(0, socket.gethostname(), rank.pid, size=1))
        assert (rank.poll() or rank.wait(stretch(10))) == -signal.SIGUSR1 if elastic else rank.poll() is None
        rank.kill()


def test_a_host_that_ssh_does_not_reach_is_told_once() -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as guard:
        job = job_of(guard)
        job.ssh_calls = [("far", Child(["sh", "-c", "exit 255"])), ("near", Child(["false"]))]
        for _, call in job.ssh_calls:
            call.wait_for_exit(Deadline(10.0))
            call.kill_group()
        assert pop_unreachable_hosts(job) == ["far"]
        assert pop_unreachable_hosts(job) == []


def test_the_launchers_lines_are_held_back_and_dropped_if_a_rank_explains_them() -> None:
    line = OutputLine(None, "stderr", "some help")
    report = JobReport(["a"])
    report.hold_line(line)
    assert report.pop_due_lines() == []
    assert report.pop_due_lines(last=True) == [line]
    report.hold_line(line)
    report.add_message(failed(0, "a"))
    assert report.pop_due_lines(last=True) == []
    assert report.next_due_at() is None


def test_a_message_counts_for_ranks_and_hosts_of_this_launch_only() -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as guard:
        fixed = job_of(guard, ["a", "b"])
        started = RankStarted(1, "x", 7)
        assert is_of_this_launch(fixed, started) and not is_of_this_launch(fixed, replace(started, rank=2))
        elastic = job_of(guard, elastic=True)
        assert is_of_this_launch(elastic, replace(started, rank=99, reach="a"))
        assert not is_of_this_launch(elastic, replace(started, reach="b"))
