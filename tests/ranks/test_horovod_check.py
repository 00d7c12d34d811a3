"""`hvdtrain horovod check` on the real library: two ranks over Gloo, two over MPI."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdtrain.native import check, installed
from hvdtrain.native.mpi import find_mpi
from tests.support.limits import stretch


@pytest.mark.timeout(180)
def test_check_of_the_installed_horovod() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hvdtrain", "horovod", "check"], capture_output=True, text=True, timeout=stretch(150)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built with Gloo" in done.stdout
    gloo = [line for line in done.stdout.splitlines() if line.startswith("Gloo  ok")]
    assert len(gloo) == 1 and "on 2 ranks" in gloo[0]
    horovod = installed.require_horovod()
    if find_mpi() and horovod.record and horovod.record.mpi:
        assert "MPI   ok" in done.stdout


def test_a_failed_launcher_is_reported_with_its_reason() -> None:
    outcome = check.run_probe([sys.executable, "-c", "raise SystemExit('OSError: no such thing')"], 30)
    assert not outcome.ok
    assert outcome.text.startswith("exit code 1 after ") and outcome.text.endswith("ms: OSError: no such thing")


def test_a_launcher_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    start = time.monotonic()
    outcome = check.run_probe([sys.executable, "-c", script], 2)
    assert not outcome.ok and "no answer in 2 s" in outcome.text
    assert time.monotonic() - start < 20
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_check_reports_that_horovod_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "find_horovod", lambda: None)
    assert check.check_installation() is False
    assert capsys.readouterr().out == "Horovod is not installed: run `hvdtrain horovod build`\n"


def test_check_reports_a_horovod_for_another_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = installed.require_horovod()
    assert real.record is not None
    record = dataclasses.replace(real.record, torch="2.9.0+cu128", mpi=None, nccl=None)
    stale = installed.InstalledHorovod(real.version, real.folder, record, True)
    monkeypatch.setattr(check, "find_horovod", lambda: stale)
    assert check.check_installation() is False
    assert capsys.readouterr().out.splitlines()[-1].endswith("is installed: run `hvdtrain horovod build`")
