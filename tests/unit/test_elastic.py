"""Elastic runs without ranks: places, discovery, leases, the server where ranks meet."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.cli.main import root_command
from hvdtrain.comm.horovod_places import place_ranks
from hvdtrain.elastic.peers import HeartbeatMonitor
from hvdtrain.elastic.ranks import assign_ranks, list_whole_replicas
from hvdtrain.elastic.records import Candidate, Heartbeat
from hvdtrain.launch.discovery import debounce
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.relaunch import run_with_relaunches
from hvdtrain.launch.run import JobResult
from hvdtrain.launch.signals import SignalInbox
from hvdtrain.system.errors import UserError
from tests.support.limits import stretch
from tests.unit.test_relaunch import launch_of_one_host


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_places_are_what_horovod_expects(hosts: list[str]) -> None:
    """Ranks and local ranks count up; a cross communicator holds one rank of each host that has so many."""
    line = [f"m{i}" for i in range(len(hosts))]
    members = assign_ranks(line, dict(zip(line, hosts, strict=True)))
    assert [m.rank for m in members] == list(range(len(hosts)))
    assert sorted(m.id for m in members) == sorted(line)
    assert members[0].id == "m0"
    for member in members:
        of_host = [m for m in members if m.host == member.host]
        assert [m.local_rank for m in of_host] == list(range(len(of_host)))
        assert member.local_size == len(of_host)
        across = [m for m in members if m.local_rank == member.local_rank]
        worlds = [place_ranks([other.host for other in members])[m.rank] for m in across]
        assert [at.cross_rank for at in worlds] == list(range(len(across)))
        assert all(at.cross_size == len(across) for at in worlds)


def test_only_whole_replicas_are_in_a_generation() -> None:
    """Places are those of the slots; a replica that lacks a member waits, and replicas stay in their order."""
    slots = {"b1": ("b", 1), "b0": ("b", 0), "a2": ("a", 2), "a0": ("a", 0), "a3": ("a", 3), "c1": ("c", 1)}
    candidates = {name: Candidate(3, host, slot, True) for name, (host, slot) in slots.items()}
    assert list_whole_replicas(list(slots), candidates, 2) == ["b0", "b1", "a2", "a3"]
    assert list_whole_replicas(list(slots), candidates, 1) == list(slots)
    assert list_whole_replicas(list(slots), candidates, 4) == []


ANSWERS = st.dictionaries(st.sampled_from("abc"), st.integers(1, 2))


@given(ANSWERS, ANSWERS)
def test_two_equal_answers_are_reported_to_horovodrun(before: dict[str, int], now: dict[str, int]) -> None:
    standing = debounce.apply_confirmed_changes({}, None, before)
    assert standing == before
    assert debounce.apply_confirmed_changes(debounce.apply_confirmed_changes(standing, before, now), now, now) == now


@given(ANSWERS, ANSWERS)
def test_one_answer_changes_nothing(stood: dict[str, int], odd: dict[str, int]) -> None:
    """A host that is missing once, or there once, is no change."""
    once = debounce.apply_confirmed_changes(stood, stood, odd)
    assert debounce.apply_confirmed_changes(once, odd, stood) == once == stood


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 3", "ended with code 3"),
        ("echo 'a b'", "printed 'a b'"),
        ("echo a:0", "printed 'a:0'"),
        ("true", "printed no host"),
    ],
)
def test_unusable_script_output_is_refused_with_the_reason(tmp_path: Path, script: str, why: str) -> None:
    path = executable(tmp_path / "hosts.sh", script)
    with pytest.raises(debounce.DiscoveryError, match=why):
        debounce.run_discovery_script(str(path))


def test_a_script_that_hangs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVDTRAIN_DISCOVERY_SECONDS", "1")
    path = executable(tmp_path / "hosts.sh", f"sleep 61 & echo $! > {tmp_path}/pid; sleep 61")
    with pytest.raises(debounce.DiscoveryError, match="took longer than 1 s"):
        debounce.run_discovery_script(str(path))
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + stretch(10)
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.mark.parametrize("seconds", [0, 0.3])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_between_two_launches(
    number: int, code: int, seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the lost job is cleaned up, or in the pause after it: the job is not launched again."""
    launches = []

    def run(spec: JobSpec, inbox: SignalInbox) -> JobResult:
        assert spec.list_hosts is not None and spec.list_hosts() == ["localhost"]
        launches.append(spec.command_line)
        if seconds:
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)
        return JobResult(1, False)

    assert run_with_relaunches(launch_of_one_host(relaunches=3), run) == code
    assert len(launches) == 1
    assert "relaunch 1 of 3 in 2 s" in capsys.readouterr().err


def test_last_good_answer_is_repeated_when_the_script_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = executable(tmp_path / "hosts.sh", "echo a:2; echo b"), tmp_path / "state.json"
    assert debounce.main(state, str(path)) == 0
    executable(path, "exit 1")
    assert debounce.main(state, str(path)) == 0
    said = capsys.readouterr()
    assert said.out == "a:2\nb:1\n" * 2
    assert "its last good answer stays valid" in said.err


def beat(number: int) -> Heartbeat:
    return Heartbeat(number, "m", "h", 2, False, False, True, 0)


def test_a_lease_counts_changes_and_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = HeartbeatMonitor()
    assert watch.find_expired({"a": beat(1), "b": beat(7)}, 10) == set()
    for beats in range(2, 14):
        now += 1
        lost = watch.find_expired({"a": beat(beats), "b": beat(7)}, 10)
    assert lost == {"b"}
    now += 60  # this process was frozen, and nothing can be said of the others
    assert watch.find_expired({"a": beat(13), "b": beat(7)}, 10) == set()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--elastic"], "takes its hosts from one of"),
        (["--elastic", "--discovery", "nowhere"], "there is no such file"),
        (["--elastic", "-H", "localhost:2", "--min-np", "3"], "--min-np 3 is more than the 2 slots"),
        (["--elastic", "-H", "localhost:2", "--min-np", "2", "--max-np", "1"], "--max-np 1 is less than --min-np 2"),
        (["--elastic", "-np", "2", "-H", "localhost:2"], "--elastic takes --min-np and --max-np"),
        (["--elastic", "-H", "localhost:2", "--launcher", "mpirun"], "needs --launcher horovodrun"),
        (["--elastic", "-H", "localhost:2", "--relaunch", "2"], "--relaunch needs --run-dir"),
        (["-np", "2", "--min-np", "1"], "--min-np 1 goes with --elastic"),
        (["--elastic", "-H", "localhost:2", "digits", "--batch-per-rank", "8"], "an elastic run takes --batch-size"),
        (
            ["--elastic", "-H", "localhost:2", "digits", "--compression", "topk,momentum=0.9"],
            "--compression topk,momentum=0.9: no momentum in an elastic run, which may come down to one rank",
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(options: list[str], expected: str) -> None:
    result = CliRunner().invoke(root_command, ["launch", *options, *(["digits"] if "digits" not in options else [])])
    assert isinstance(result.exception, UserError)
    assert expected in str(result.exception)


def test_elastic_dry_run_prints_horovodruns_options(tmp_path: Path) -> None:
    script = executable(tmp_path / "hosts.sh", "echo localhost:2")
    options = ["--elastic", "--min-np", "1", "--max-np", "4", "--discovery", str(script), "--dry-run", "digits"]
    said = CliRunner().invoke(root_command, ["launch", *options], catch_exceptions=False).output
    assert "--min-np 1 --max-np 4 --blacklist-cooldown-range 10 300 --host-discovery-script" in said
    assert "--network-interfaces lo" in said
    assert said.rstrip().endswith("hvdtrain train digits")


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path
