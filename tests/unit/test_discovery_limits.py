"""A discovery script may print and do what it likes: it costs no more than a second's look."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hvdtrain.launch.discovery import debounce
from tests.support.limits import stretch


def script(folder: Path, text: str) -> str:
    path = folder / "hosts.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exec yes", "^printed more than 1 MiB$"),
        ("sh -c 'echo $$ > pid; exec yes localhost:1' & wait", "^printed more than 1 MiB$"),
        ("echo a:1; exec yes error >&2", "^printed more than 1 MiB$"),
        ("exec cat /dev/zero", "^printed more than 1 MiB$"),
        ("echo localhost:99999999999", "^printed 'localhost:99999999999', which is neither"),
        ("echo localhost:99999", "^printed 'localhost:99999': more than 1024 slots for a host$"),
        ("seq 1 20000 | sed s/^/h/", "^printed more than 10000 hosts$"),
        ("seq 1 700000 | sed s/^/h/", "^printed more than 1 MiB$"),
    ],
)
def test_an_answer_beyond_all_limits_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HVDTRAIN_DISCOVERY_SECONDS", "30")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(debounce.DiscoveryError, match=why):
        debounce.run_discovery_script(script(tmp_path, text))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    if (tmp_path / "pid").exists():
        until = time.monotonic() + stretch(20)
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(int((tmp_path / "pid").read_text())).status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < until
                time.sleep(0.02)


@pytest.mark.parametrize("path", ["/no/such/script", "a\0b"])
def test_a_script_that_cannot_be_run_is_no_answer(path: str) -> None:
    with pytest.raises(debounce.DiscoveryError, match=r"^cannot be run: "):
        debounce.run_discovery_script(path)


def test_whatever_fails_the_last_good_answer_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    assert debounce.main(state, script(tmp_path, "echo a:2")) == 0
    monkeypatch.setattr(debounce, "parse_script_output", lambda output: 1 // 0)
    assert debounce.main(state, script(tmp_path, "echo b:2")) == 0
    out, err = capsys.readouterr()
    assert out == "a:2\na:2\n" and "failed: ZeroDivisionError" in err and "its last good answer stays valid" in err


def test_a_fixed_list_of_hosts_is_a_discovery_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hvdtrain.launch.discovery.debounce", "--hosts", "a:2,b:3"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a:2\nb:3\n", "")
