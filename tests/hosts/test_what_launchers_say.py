"""What launchers were seen to say when a host or a rank on one was lost, and what launch makes of it."""

from __future__ import annotations

import pytest

from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.outcome import determine_outcome
from hvdtrain.launch.output import OutputLine
from hvdtrain.launch.report import JobReport
from hvdtrain.system.messages import RankStarted

LOST_HOST = """
Connection to h1 closed by remote host.
--------------------------------------------------------------------------
PRTE has lost communication with a remote daemon.

  HNP daemon   : [prterun-h0-18@0,0] on node h0
  Remote daemon: [prterun-h0-18@0,2] on node h1

This is usually due to either a failure of the TCP network
"""
NO_DAEMON = """
A daemon failed to report back after being spawned. This could
be due to several factors, including inability to find the
back to prterun:

  Local host:    h0
  Remote host:   h1
  Daemon exit status: 255
"""
ABORTED = """
prterun has exited due to process rank 0 with PID 0 on node h0 calling
"abort". This may have caused other processes in the application to be
"""
MISSED = ["An MPI communication peer process has unexpectedly disconnected.  This", "  Peer host:  h1"]


def ended(launcher: str, text: str, code: int, hosts: list[str], of_rank: list[str] | None = None) -> tuple[int, str]:
    """The outcome after a launcher has said some text, and rank 0 some lines; both ranks had started."""
    report = JobReport(hosts, LAUNCHERS.get(launcher).output)
    for rank in (0, 1):
        report.add_message(RankStarted(rank, hosts[rank], 7))
    for line in of_rank or []:
        report.note_lost_peer(OutputLine(0, "stderr", line))
    for line in text.splitlines():
        report.hold_line(OutputLine(None, "stderr", line))
    return determine_outcome(report, launcher, code)


def test_mpirun_that_loses_a_host_ends_with_code_0_but_launch_does_not() -> None:
    expected = "error: rank 1 on h1 was lost: the connection to the host failed"
    assert ended("mpirun", LOST_HOST, 0, ["h0", "h1"]) == (1, expected)
    assert ended("mpirun", NO_DAEMON, 255, ["h0", "h1"]) == (1, expected)
    silent = "error: rank 0 on h0 ended with code 0 and no message before it had finished"
    assert ended("mpirun", "", 0, ["h0", "h1"]) == (1, silent)


def test_the_rank_that_another_one_missed_is_named() -> None:
    why = "was lost: it ended, or its host did, without a message"
    assert ended("mpirun", ABORTED, 14, ["h0", "h1"], MISSED) == (1, f"error: rank 1 on h1 {why}")
    assert ended("mpirun", ABORTED, 14, ["h0", "h1", "h1"], MISSED) == (1, f"error: rank 1 or 2 on h1 {why}")


@pytest.mark.parametrize(
    ("hosts", "hint"),
    [(["h0", "h1"], ": over ssh, that is a rank killed by a signal, or a lost connection"), (["localhost"] * 2, "")],
)
def test_code_255_is_no_signal(hosts: list[str], hint: str) -> None:
    expected = f"error: rank 1 on {hosts[1]} ended with code 255 and no message{hint}"
    assert ended("horovodrun", "Process 1 exit with status code 255.", 1, hosts) == (1, expected)
