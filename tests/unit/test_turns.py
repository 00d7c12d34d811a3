"""Processes take turns by a lock that nobody else can hold, redirect or turn into something else."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hvdtrain.system import turns
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.limits import LockLimits
from hvdtrain.system.turns import hold_host_lock, lock_folders, open_lock_file
from tests.support.limits import stretch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "run").mkdir()
    return {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path / "home"), "HVDTRAIN_DATA_WAIT": "0.5"}


def lock_of(environ: dict[str, str]) -> Path:
    found = open_lock_file(f"{os.uname().nodename}-mine.lock", environ)
    assert found is not None
    os.close(found[0])
    return found[1]


def test_one_is_in_its_turn_at_a_time(environ: dict[str, str]) -> None:
    environ["HVDTRAIN_DATA_WAIT"] = "60"
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with hold_host_lock("mine", "load", environ):
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    folder = lock_of(environ).parent
    assert folder.stat().st_mode & 0o777 == 0o700 and lock_of(environ).stat().st_mode & 0o777 == 0o600


def test_a_wait_names_who_is_waited_for_and_has_an_end(
    environ: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    second = hold_host_lock("mine", "load the data of Mine", environ, LockLimits(wait=0.4, silent=0.2))
    with hold_host_lock("mine", "load the data of Mine", environ), pytest.raises(RunError) as refused, second:
        raise AssertionError
    who = f"pid {os.getpid()}"
    assert re.match(
        f"{who} has held /.*, to load the data of Mine, for more than 0 s: end it, or set HVDTRAIN_DATA_WAIT",
        str(refused.value),
    )
    assert (
        f"hvdtrain: waiting up to 0 s for {who} on this host to load the data of Mine (lock " in capfd.readouterr().err
    )
    with hold_host_lock("mine", "load", environ):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_lives_on_holds_no_turn(environ: dict[str, str]) -> None:
    with hold_host_lock("mine", "load", environ):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with hold_host_lock("mine", "load", environ):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.parametrize("trap", ["link", "FIFO", "folder"])
def test_what_is_not_a_lock_file_of_ours_is_not_opened(trap: str, environ: dict[str, str], tmp_path: Path) -> None:
    path = lock_of(environ)
    path.unlink()
    precious = tmp_path / "precious"
    precious.write_text("precious")
    {"link": lambda: path.symlink_to(precious), "FIFO": lambda: os.mkfifo(path), "folder": path.mkdir}[trap]()
    with hold_host_lock("mine", "load", environ):
        pass
    assert precious.read_text() == "precious"
    assert lock_of(environ).is_relative_to(tmp_path / "home")


def test_a_folder_that_is_a_link_or_another_user_s_is_not_used(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "hvdtrain").symlink_to(tmp_path / "elsewhere")
    assert lock_of(environ).is_relative_to(tmp_path / "home")
    monkeypatch.setattr(turns.os, "geteuid", lambda: 12345)
    with hold_host_lock("mine", "load", environ):
        pass
    assert "neither XDG_RUNTIME_DIR nor ~/.cache is a folder that only this user" in capfd.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_without_private_folders_or_locks_nobody_waits(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lock_folders({}) == [] == lock_folders({"XDG_RUNTIME_DIR": "relative"})
    with hold_host_lock("mine", "load", {}):
        pass

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with hold_host_lock("mine", "load", environ):
        pass


def test_a_limit_that_is_not_a_number_is_refused(environ: dict[str, str]) -> None:
    turn = hold_host_lock("mine", "load", {**environ, "HVDTRAIN_DATA_WAIT": "soon"})
    with pytest.raises(UserError, match="HVDTRAIN_DATA_WAIT is 'soon'; expected seconds"), turn:
        raise AssertionError


def test_nothing_in_tmp_has_a_name_that_others_can_guess(tmp_path: Path) -> None:
    """What a process that loads its data leaves in the folder for temporary files; its recipe is in no file."""
    code = (
        "import os, tempfile; from hvdtrain.torch.setup import lock_data_loading\n"
        "from hvdtrain.recipe.registry import load_recipe\n"
    )
    code += "class Own(load_recipe('digits')): pass\n"
    code += "with lock_data_loading(Own()): print(os.listdir(tempfile.gettempdir()))"
    (tmp_path / "tmp").mkdir()
    environ = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=stretch(100), cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
