"""One owner of a run folder: its lease is renewed, waited for, taken over, handed on, and its loss is noticed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvdtrain.system.errors import UserError
from hvdtrain.training import lease as lease_module
from hvdtrain.training.lease import FolderLost, Lease, read_lease, remove_lease
from hvdtrain.training.owner import Owner
from tests.support.limits import stretch

SHORT = 0.6


def write_owner(folder: Path, **changed: Any) -> Owner:
    """A lease that somebody else holds; by default a living process of another machine."""
    there: dict[str, Any] = {"host": "elsewhere", "machine": "m", "boot": "b", "pid": 77}
    owner = replace(Owner.for_this_process("other", SHORT), **{**there, **changed})
    (folder / "owner.json").write_bytes(owner.encode())
    return owner


def renew_often(path: Path, stop: threading.Event) -> None:
    while not stop.wait(0.05):
        os.utime(path)


@pytest.fixture
def renewed(tmp_path: Path) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=renew_often, args=(tmp_path / "owner.json", stop))
    write_owner(tmp_path)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_a_lease_is_held_renewed_and_given_up(tmp_path: Path) -> None:
    with Lease(seconds=SHORT) as lease:
        lease.acquire(tmp_path, wait=False)
        before = (tmp_path / "owner.json").stat().st_mtime_ns
        time.sleep(SHORT / 2)
        assert (tmp_path / "owner.json").stat().st_mtime_ns > before
        lease.check_ownership(now=True)
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_refused_in_a_line_that_names_the_first(tmp_path: Path) -> None:
    with Lease(seconds=SHORT) as first:
        first.acquire(tmp_path, wait=False)
        for wait in (False, True):
            with pytest.raises(UserError) as refused:
                Lease(seconds=SHORT).acquire(tmp_path, wait=wait)
            who = f"run folder {tmp_path} is in use by pid {os.getpid()} on {os.uname().nodename}"
            assert str(refused.value).startswith(f"{who}, which renewed its lease 0 s ago: wait for its end, or ")
        first.check_ownership(now=True)


def test_of_many_that_start_together_one_becomes_the_owner(tmp_path: Path) -> None:
    write_owner(tmp_path, **local(pid=2**22 - 1))  # dead: all try to take over at the same time
    leases = [Lease(seconds=60) for _ in range(16)]

    def acquire(lease: Lease) -> bool:
        try:
            lease.acquire(tmp_path, wait=True)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(acquire, leases)) == 1
    for lease in leases:
        lease.check_ownership(now=True)
        lease.release()


def test_one_of_many_that_start_together_again_and_again(tmp_path: Path) -> None:
    for number in range(15):
        (tmp_path / str(number)).mkdir()
        test_of_many_that_start_together_one_becomes_the_owner(tmp_path / str(number))


def local(**changed: Any) -> dict[str, Any]:
    here = Owner.for_this_process("", 1)
    return {"host": here.host, "machine": here.machine, "boot": here.boot, "pid": here.pid, **changed}


@pytest.mark.parametrize(
    "dead",
    [
        {"pid": 2**22 - 1},
        {"started": 1},  # the number of the process has been given to another one
        {"boot": "before the machine was started again"},
    ],
)
def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(dead: dict[str, Any], tmp_path: Path) -> None:
    if "boot" in dead and not Owner.for_this_process("", 1).machine:
        pytest.skip("this machine has no /etc/machine-id")
    write_owner(tmp_path, **local(**dead), seconds=1000.0)
    with Lease(seconds=1000) as lease:
        lease.acquire(tmp_path, wait=False)


def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    code = "from hvdtrain.training.lease import *; import time; l = Lease(seconds=1000)\n"
    code += "l.acquire(Path(sys.argv[1]), wait=False); print(flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=f"is in use by pid {process.pid} on "):
            Lease(seconds=1000).acquire(tmp_path, wait=True)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with Lease(seconds=1000) as lease:
            lease.acquire(tmp_path, wait=False)


def test_the_lease_of_another_machine_is_not_waited_for_by_a_new_run(tmp_path: Path) -> None:
    owner = write_owner(tmp_path)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"is in use by pid 77 on elsewhere, which renewed its lease \d s ago: wait"):
        Lease(seconds=SHORT).acquire(tmp_path, wait=False)
    assert time.monotonic() - begin < SHORT
    assert (tmp_path / "owner.json").read_bytes() == owner.encode()


@pytest.mark.parametrize("skew", [-(10**6), 10**6])
def test_a_lease_that_is_not_renewed_is_taken_over_whatever_the_clocks_say(
    skew: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_owner(tmp_path)
    os.utime(tmp_path / "owner.json", (time.time() + skew,) * 2)
    begin = time.monotonic()
    with Lease(seconds=60) as lease:
        lease.acquire(tmp_path, wait=True)
        assert SHORT < time.monotonic() - begin < SHORT + 5  # as long as its holder had said
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "waiting up to 1 s, as that run may have died" in lines[0]
    assert "pid 77 on elsewhere" in lines[0] and "taking over from pid 77 on elsewhere" in lines[1]


@pytest.mark.usefixtures("renewed")
def test_a_lease_that_is_renewed_while_another_run_waits_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is in use by pid 77 on elsewhere, .*, while this run waited for it"):
        Lease(seconds=SHORT).acquire(tmp_path, wait=True)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[" * 9999, b"\0" * 1024, b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_is_waited_for(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a process that owner\.json does not name"):
        Lease(seconds=SHORT).acquire(tmp_path, wait=False)
    with Lease(seconds=SHORT) as lease:
        lease.acquire(tmp_path, wait=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_bytes_are_an_owner_or_none(data: st.DataObject) -> None:
    whole = Owner.for_this_process("launch", 60).encode()
    at = data.draw(st.integers(0, len(whole)))
    some = data.draw(st.binary(max_size=8))
    owner = Owner.decode(whole[:at] + some + whole[at + len(some) :])
    assert owner is None or isinstance(owner.pid, int)


def test_the_loser_notices_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "CHECK_INTERVAL", 0.0)
    first = Lease(seconds=SHORT)
    first.acquire(tmp_path, wait=False)
    found = read_lease(tmp_path / "owner.json")
    assert found is not None
    remove_lease(tmp_path / "owner.json", found)
    with Lease(seconds=SHORT) as second:
        second.acquire(tmp_path, wait=False)
        renewed_by_second = (tmp_path / "owner.json").stat().st_ino
        with pytest.raises(FolderLost, match=r"was taken over by pid \d+ on .*; this run did not respond in time"):
            first.check_ownership()
        first.release()
        second.check_ownership(now=True)
        assert (tmp_path / "owner.json").stat().st_ino == renewed_by_second


def test_a_lease_that_was_judged_before_is_not_taken_from_its_next_holder(tmp_path: Path) -> None:
    write_owner(tmp_path)
    judged = read_lease(tmp_path / "owner.json")
    assert judged is not None
    remove_lease(tmp_path / "owner.json", judged)
    with Lease(seconds=SHORT) as second:
        second.acquire(tmp_path, wait=False)
        remove_lease(tmp_path / "owner.json", judged)
        second.check_ownership(now=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: shutil.rmtree(folder), "was deleted, moved or unmounted during the run"),
        (lambda folder: folder.rename(folder.with_name("moved")), "was deleted, moved or unmounted during the run"),
        (
            lambda folder: (folder / "owner.json").unlink(),
            "is gone: another run took the folder over and has ended, or it was deleted",
        ),
        (
            lambda folder: (shutil.rmtree(folder), folder.mkdir()),
            "was replaced or unmounted during the run|is gone: another run",
        ),
        (lambda folder: replace_by_copy(folder), "was replaced by a copy during the run"),
        (lambda folder: (shutil.rmtree(folder), folder.touch()), "was deleted, moved or unmounted during the run"),
    ],
)
def test_a_folder_that_is_not_the_same_any_more_is_lost(change: Any, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with Lease(seconds=SHORT) as lease:
        lease.acquire(folder, wait=False)
        change(folder)
        with pytest.raises(FolderLost, match=text):
            lease.check_ownership(now=True)


def replace_by_copy(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    folder.rename(folder.with_name("moved"))
    folder.with_name("copy").rename(folder)


def test_a_launch_hands_its_lease_on(tmp_path: Path) -> None:
    first, second = Lease("launch", SHORT), Lease("launch", SHORT)
    first.acquire(tmp_path, wait=False)
    second.take_over(tmp_path)
    with pytest.raises(FolderLost) as lost:
        first.check_ownership(now=True)
    assert lost.value.same_launch
    first.keep_for_launch = True
    first.release()
    second.check_ownership(now=True)
    second.take_over(tmp_path)  # in the next generation
    second.keep_for_launch = True
    second.release()
    assert (tmp_path / "owner.json").exists()
    with Lease("launch", SHORT) as third:
        third.acquire(tmp_path, wait=False)


def test_a_folder_of_another_launch_or_none_is_not_handed_on(tmp_path: Path) -> None:
    with pytest.raises(FolderLost, match="was deleted, moved or unmounted"):
        Lease("launch", SHORT).take_over(tmp_path / "run")
    with pytest.raises(FolderLost, match="is gone: another run took the folder over"):
        Lease("launch", SHORT).take_over(tmp_path)
    write_owner(tmp_path)
    with pytest.raises(FolderLost, match="was taken over by pid 77 on elsewhere"):
        Lease("launch", SHORT).take_over(tmp_path)


def test_a_lease_that_cannot_be_handed_on_now_is_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lease("launch", 60).acquire(tmp_path, wait=False)

    def fail(*_: Any) -> None:
        raise OSError(errno.ESTALE, "stale")

    with Lease("launch", 60) as second:
        with monkeypatch.context() as patch:
            patch.setattr(lease_module.os, "pwrite", fail)
            second.take_over(tmp_path)
            with pytest.raises(OSError):
                second.check_ownership(now=True)
        assert not second.is_held
        second.check_ownership(now=True)
        assert second.is_held


def test_a_frozen_holder_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    code = "from hvdtrain.training.lease import *; import time; l = Lease(seconds=0.6)\n"
    code += "l.acquire(Path(sys.argv[1]), wait=False); print(flush=True); time.sleep(2)\n"
    code += "while True: l.check_ownership(); time.sleep(0.1)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        with Lease(seconds=60) as lease:
            lease.acquire(tmp_path, wait=True)
            process.send_signal(signal.SIGCONT)
            process.wait(stretch(30))
            assert "FolderLost" in process.stderr.read()
            lease.check_ownership(now=True)


def test_the_seconds_of_a_lease_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Lease().seconds == 60
    monkeypatch.setenv("HVDTRAIN_FOLDER_LEASE", "2.5")
    assert Lease().seconds == 2.5
    for text in ("x", "0", "-1", "nan", "inf", "1e9"):
        monkeypatch.setenv("HVDTRAIN_FOLDER_LEASE", text)
        with pytest.raises(UserError, match=f"HVDTRAIN_FOLDER_LEASE is '{text}'; expected seconds, from 0.1 to 604800"):
            Lease()
