"""`hvdtrain agent`: real processes, real signals, and the folder that they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.preemption.membership_folder import (
    DrainNotice,
    HostRecord,
    read_drain_notice,
    read_host_record,
    write_host_record,
)
from hvdtrain.preemption.source import NoticeSource
from tests.support.cpu import children_cpu_seconds
from tests.support.limits import stretch
from tests.unit.http_server import serving
from tests.unit.test_notices import ACTION, AwsServer, iso

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "members"


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts an agent for host `a`, whose first heartbeat is there; all are ended at last."""
    started: list[subprocess.Popen[str]] = []

    def begin(source: str = "signal", *options: str, boot: str | None = "boot1", **environ: str) -> Any:
        line = [sys.executable, "-m", "hvdtrain", "agent", "--source", source, "--membership", str(folder)]
        line += ["--host", "a", "--interval", "0.1", *options]
        line += ["--boot-id", boot] if boot else []
        started.append(subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=os.environ | environ))
        pid = started[-1].pid
        wait_for(lambda: (member := read_host_record(folder, "a")) is not None and member.pid == pid)
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + stretch(seconds)
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def wait_beats(folder: Path, count: int = 3) -> HostRecord:
    """The member after a few heartbeats more."""
    first = read_host_record(folder, "a")
    assert first is not None
    wait_for(lambda: (now := read_host_record(folder, "a")) is not None and now.beat >= first.beat + count)
    member = read_host_record(folder, "a")
    assert member is not None
    return member


def wait_draining(folder: Path) -> DrainNotice:
    wait_for(lambda: read_drain_notice(folder, "a") is not None)
    draining = read_drain_notice(folder, "a")
    assert draining is not None
    return draining


def end(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    process.send_signal(number)
    _, said = process.communicate(timeout=stretch(20))
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_agent_registers_sends_heartbeats_and_deregisters(
    start: Start, folder: Path, tmp_path: Path, number: int
) -> None:
    process = start("file", "--notice-file", str(tmp_path / "notice"), "--slots", "3")
    member = wait_beats(folder)
    assert (member.host, member.slots, member.boot_id, member.pid) == ("a", 3, "boot1", process.pid)
    assert member.state == "live"
    assert abs(member.started - time.time()) < 60
    assert end(process, number) == (0, "")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_notice_and_a_later_one_the_end(start: Start, folder: Path, number: int) -> None:
    process = start("signal", "--grace", "50")
    process.send_signal(number)
    draining = wait_draining(folder)
    assert (draining.host, draining.boot_id, draining.source, draining.seconds) == ("a", "boot1", "signal", 50.0)
    assert draining.reason == signal.Signals(number).name
    assert abs(draining.deadline - time.time() - 50) < 15
    process.send_signal(signal.SIGTERM)  # the same one, to the process group, say
    time.sleep(1.2)
    assert wait_beats(folder).state == "draining"
    assert read_drain_notice(folder, "a") == draining
    code, said = end(process, signal.SIGTERM)
    assert code == 0
    assert said == f"hvdtrain agent: a will be preempted in 50 s (signal: {draining.reason})\n"
    assert [path.name for path in folder.iterdir()] == ["a.draining"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1])
def test_slurm_ends_at_the_deadline(start: Start, folder: Path, number: int) -> None:
    process = start("slurm", "--grace", "4", boot=None, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1")
    process.send_signal(number)
    draining = wait_draining(folder)
    assert draining.boot_id == f"{NoticeSource().read_boot_id()}+17.1"
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)  # Slurm's second, at the end of the grace
    process.communicate(timeout=stretch(20))
    assert process.returncode == 0
    assert time.time() > draining.deadline - 1
    assert read_host_record(folder, "a") is None
    # The next allocation may have the same node, which was not booted in between.
    start("slurm", boot=None, SLURM_JOB_ID="18")
    assert read_drain_notice(folder, "a") is None


def test_notice_file_makes_the_host_drain(start: Start, folder: Path, tmp_path: Path) -> None:
    process = start("file", "--notice-file", str(tmp_path / "notice"))
    (tmp_path / "notice").write_text("maintenance")
    draining = wait_draining(folder)
    assert (draining.source, draining.reason, draining.seconds) == ("file", "maintenance", 30.0)
    assert end(process, signal.SIGTERM)[0] == 0


def test_aws_sooner_end_takes_the_place_of_a_later_one(start: Start, folder: Path) -> None:
    server = AwsServer()
    server.pages["/latest/meta-data/events/recommendations/rebalance"] = {"noticeTime": iso(time.time())}
    with serving(server) as url:
        process = start("aws", "--url", url + "/", "--rebalance", "--grace", "600")
        assert wait_draining(folder).reason == "rebalance recommendation"
        server.pages[ACTION] = {"action": "terminate", "time": iso(time.time() + 100)}
        wait_for(lambda: "terminate" in wait_draining(folder).reason)
        draining = wait_draining(folder)
        assert abs(draining.deadline - time.time() - 100) < 20
        assert end(process, signal.SIGTERM)[0] == 0
    assert read_drain_notice(folder, "a") == draining


def test_a_host_told_to_go_stays_so_until_it_is_booted(start: Start, folder: Path) -> None:
    process = start()
    process.send_signal(signal.SIGUSR1)
    draining = wait_draining(folder)
    process.kill()
    process.communicate()

    process = start()
    assert wait_beats(folder).state == "draining"
    assert read_drain_notice(folder, "a") == draining
    code, said = end(process, signal.SIGINT)
    assert code == 0
    assert said.startswith("hvdtrain agent: a is still draining (signal: SIGUSR1)")

    process = start(boot="boot2")
    assert read_drain_notice(folder, "a") is None
    member = wait_beats(folder)
    assert (member.state, member.boot_id) == ("live", "boot2")


def test_a_notice_that_was_removed_or_not_written_is_written_again(start: Start, folder: Path) -> None:
    process = start()
    process.send_signal(signal.SIGUSR1)
    draining = wait_draining(folder)
    (folder / "a.draining").unlink()
    assert wait_draining(folder) == draining


def test_a_folder_that_is_gone_for_a_while(start: Start, folder: Path) -> None:
    process = start()
    folder.rename(folder.with_name("away"))
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    folder.with_name("away").rename(folder)
    wait_draining(folder)
    code, said = end(process, signal.SIGINT)
    assert code == 0
    assert said.count(f"{folder}: No such file or directory; retrying") == 1


def test_two_agents_of_one_name_are_told_so(start: Start, folder: Path) -> None:
    first = start()
    second = start(boot="boot2")
    time.sleep(1)
    assert f"another agent, process {second.pid}, also writes a.json" in end(first, signal.SIGINT)[1]
    wait_for(lambda: read_host_record(folder, "a") is not None)  # the first may have been the last to write it
    assert wait_beats(folder).pid == second.pid


OUTSIDE_SOURCE = """
from dataclasses import dataclass
from hvdtrain.preemption.source import Notice, NoticeSource, notice_source, source_option

@notice_source("meadow")
@dataclass(kw_only=True)
class MeadowSource(NoticeSource):
    '''Meadow's own scheduler.'''

    poll_interval = 0.1
    gate: str = source_option("north", "The gate to watch.", metavar="NAME")

    def poll(self):
        return Notice(f"{self.host} leaves by the {self.gate} gate", self.grace)
"""


@pytest.fixture
def outside_source(tmp_path: Path) -> Path:
    """A folder with a distribution that has a notice source `meadow`, and one, `pond`, that cannot be loaded."""
    site = tmp_path / "site"
    about = site / "meadow-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "meadow.py").write_text(OUTSIDE_SOURCE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: meadow\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[hvdtrain.notices]\nmeadow = meadow:MeadowSource\npond = no_such:Pond\n")
    return site


def test_a_source_of_another_package_drains_the_host(start: Start, folder: Path, outside_source: Path) -> None:
    process = start("meadow", "--gate", "south", "--grace", "40", PYTHONPATH=str(outside_source))
    draining = wait_draining(folder)
    assert (draining.source, draining.reason, draining.seconds) == ("meadow", "a leaves by the south gate", 40.0)
    code, said = end(process, signal.SIGTERM)
    assert (code, said) == (0, "hvdtrain agent: a will be preempted in 40 s (meadow: a leaves by the south gate)\n")


def test_options_and_help_of_a_source_of_another_package(outside_source: Path) -> None:
    def agent(*options: str) -> str:
        line = [sys.executable, "-m", "hvdtrain", "agent", *options]
        environ = os.environ | {"PYTHONPATH": str(outside_source)}
        done = subprocess.run(line, capture_output=True, text=True, timeout=stretch(60), check=False, env=environ)
        return done.stdout + done.stderr

    assert "--gate NAME         The gate to watch. For meadow. Default: north." in (shown := agent("--help"))
    assert "meadow  Meadow's own scheduler." in shown
    assert "--gate is for meadow, not for aws" in agent("--source", "aws", "--membership", "x", "--gate", "west")
    assert "the notice source 'pond' of meadow cannot be loaded" in agent("--source", "pond", "--membership", "x")


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ("slots: str = ", "--slots is the agent's own option; rename the field in the notice source 'meadow'"),
        (
            "notice_file: int = ",
            "--notice-file takes int in the notice source 'meadow' and Path in 'file'; rename the field",
        ),
    ],
)
def test_a_source_whose_options_clash_is_refused_by_name_and_stops_no_other(
    outside_source: Path, folder: Path, field: str, error: str
) -> None:
    file = outside_source / "meadow.py"
    assert "gate: str = " in file.read_text()
    file.write_text(file.read_text().replace("gate: str = ", field))
    environ = os.environ | {"PYTHONPATH": str(outside_source)}
    line = [sys.executable, "-m", "hvdtrain", "agent"]
    for options, code, text in (
        (["--source", "meadow", "--membership", str(folder)], 2, f"hvdtrain: error: {error}\n"),
        (["--help"], 0, "aws "),
    ):
        done = subprocess.run(
            [*line, *options], capture_output=True, text=True, timeout=stretch(60), check=False, env=environ
        )
        assert done.returncode == code and text in done.stdout + done.stderr


def test_readers_never_see_half_a_file(folder: Path) -> None:
    folder.mkdir()
    members = [HostRecord("a", 1, "boot" * size, 1, 1.0, size, "live") for size in (1, 20000)]
    write_host_record(folder, members[0])
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for member in members:
                write_host_record(folder, member)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {read_host_record(folder, "a") for _ in range(1000)} <= set(members)
    finally:
        done.set()
        writer.join()


def test_records_of_later_versions_and_junk(folder: Path) -> None:
    folder.mkdir()
    record = {"host": "a", "boot_id": "b", "deadline": 1.0, "seconds": 1.0, "source": "x", "reason": "y"}
    (folder / "a.draining").write_text(json.dumps(record | {"more": 1}))
    assert read_drain_notice(folder, "a") == DrainNotice(**record)
    for junk in ("", "{", "[]", '{"host": "a"}'):
        (folder / "a.draining").write_text(junk)
        assert read_drain_notice(folder, "a") is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--source", "file"], "--source file needs --notice-file FILE"),
        (["--source", "aws", "--notice-file", "x"], "--notice-file is for file, not for aws"),
        (["--source", "slurm", "--url", "http://x"], "--url is for aws, azure and gcp, not for slurm"),
        (["--source", "aws", "--url", "file:///x"], "--url 'file:///x' does not begin with http:// or https://"),
        (["--source", "azur"], "'azur' is not a notice source; expected one of aws, azure, file, gcp, signal, slurm"),
        (["--source", "gcp", "--grace", "-1"], "--grace -1.0: expected 0 or more seconds"),
        (["--source", "gcp", "--grace", "soon"], "Invalid value for '--grace': 'soon' is not a valid float"),
        (["--source", "gcp", "--rebalance"], "--rebalance is for aws, not for gcp"),
        (["--source", "gcp", "--host", "../a"], "--host: '../a' is not a host name or IPv4 address"),
        (["--source", "gcp", "--host", "a:2"], "--host 'a:2' is not a host name or IPv4 address"),
        (["--source", "gcp", "--membership", "no/such"], "no/such: No such file or directory"),
    ],
)
def test_invalid_agent_options_are_refused_in_one_line(tmp_path: Path, options: list[str], error: str) -> None:
    line = [sys.executable, "-m", "hvdtrain", "agent", "--membership", str(tmp_path), *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=stretch(60), check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"hvdtrain: error: {error}")


def test_starts_at_once_and_without_torch() -> None:
    code = (
        "import sys, hvdtrain.cli.agent, hvdtrain.preemption.agent, hvdtrain.launch.hosts\n"
        "heavy = {'torch', 'numpy', 'horovod'} & set(sys.modules); assert not heavy, heavy"
    )
    begin = children_cpu_seconds()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=stretch(60))
    assert children_cpu_seconds() - begin < 1.0  # 0.15 s if nothing else runs
