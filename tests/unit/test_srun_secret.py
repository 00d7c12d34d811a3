"""The secret that ranks of a bare `srun` share: in the environment, or in a file that only their user can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvdtrain.comm import srun
from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.system.errors import RunError
from hvdtrain.system.signed_http import SECRET, NotSigned

JOB = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_CLUSTER_NAME": "c/../x", "HOROVOD_START_TIMEOUT": "0.3"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_what_rank_0_leaves_the_others_find_and_nobody_else(home: Path) -> None:
    path = srun.secret_path(JOB)
    assert path == home / ".hvdtrain" / "secret-cx.7.0."
    secret = srun.write_secret(path)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert srun.read_secret(path) == secret and len(secret) == 64
    assert srun.write_secret(path) != secret  # that of a run which was ended does not stay
    srun.remove_secret(JOB)
    with pytest.raises(FileNotFoundError):
        srun.read_secret(path)
    srun.remove_secret(JOB)


def test_a_file_that_others_can_read_or_that_is_elsewhere_is_not_believed(home: Path) -> None:
    path = srun.secret_path(JOB)
    srun.write_secret(path)
    path.chmod(0o640)
    with pytest.raises(NotSigned, match="belongs to another user, or others can read it"):
        srun.read_secret(path)
    path.rename(home / "elsewhere")
    path.symlink_to(home / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        srun.read_secret(path)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert srun.read_secret(path) == ""  # does not wait


def test_what_to_do_where_nodes_share_no_home() -> None:
    srun.secret_path(JOB).parent.mkdir()
    with pytest.raises(RunError, match=rf"is not there; if the nodes do not share it, export {SECRET} in the job"):
        srun.wait_for_server(("127.0.0.1", 9), "7.0", JOB)


def test_a_server_of_somebody_else_is_not_believed() -> None:
    secret = srun.write_secret(srun.secret_path(JOB))
    server = RendezvousServer("127.0.0.1", {}, key=b"o" * 64)
    own = RendezvousServer("127.0.0.1", {}, key=secret.encode())
    try:
        server.values[srun.JOB_KEY] = own.values[srun.JOB_KEY] = b"7.0"
        with pytest.raises(RunError, match=r"answers 401 to GET .* without this run's signature"):
            srun.wait_for_server(("127.0.0.1", server.port), "7.0", JOB)
        assert srun.wait_for_server(("127.0.0.1", own.port), "7.0", JOB) == secret
        with pytest.raises(RunError, match=r"another job's server \(7\.0\) is there"):
            srun.wait_for_server(("127.0.0.1", own.port), "8.0", JOB)
    finally:
        server.stop_serving()
        own.stop_serving()
