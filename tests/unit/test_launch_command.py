"""`hvdtrain launch` up to the command line that it would run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hvdtrain.cli.main import main
from hvdtrain.errors import UserError
from hvdtrain.launch.command import find_program, forwarded, rank_environment

TRAIN = "BIN/python -m hvdtrain train digits"
OPTIONS = "--bind-to none --map-by slot"
DAEMONS = "--prtemca oob_tcp_if_include eth0 --prtemca plm_ssh_args '-p 2222'"
FORWARD = "-x HOROVOD_LOG_LEVEL -x HVDTRAIN_LAUNCH -x OMP_NUM_THREADS -x PATH -x PYTHONIOENCODING -x PYTHONUNBUFFERED"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python's folder with both launchers, a plain environment, and a `hvdtrain train` that notes what it checks."""
    for name in ("python", "horovodrun", "mpirun"):
        (tmp_path / name).touch(0o755)
    train = ModuleType("hvdtrain.cli.train")
    train.check_arguments = check_arguments  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hvdtrain.cli.train", train)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "HOME": "/home/me"})
    return tmp_path


def check_arguments(args: list[str], elastic: bool = False) -> None:
    os.environ["OMP_NUM_THREADS"] = "64"  # what importing a recipe does here is not for the ranks
    if "--epoks" in args:
        raise UserError("no option '--epoks'; did you mean '--epochs'?")


def launch(arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["launch", *shlex.split(arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("-np 4 --dry-run digits", f"BIN/horovodrun -np 4 -H localhost:4 --gloo {TRAIN}"),
        ("-np 4 --nic eth0 --dry-run digits", f"BIN/horovodrun -np 4 -H localhost:4 --gloo {TRAIN}"),
        (
            "-H a:4,b:4 --nic eth0 --ssh-port 2222 --dry-run digits --epochs 5 --unknown -np 3 --help",
            "BIN/horovodrun -np 8 -H a:4,b:4 --gloo --network-interfaces eth0 --ssh-port 2222 "
            f"{TRAIN} --epochs 5 --unknown -np 3 --help",
        ),
        (
            "-np 5 -H a:4,b:4 --controller mpi --dry-run digits --schedule 'warmup:1ep cosine'",
            f"BIN/horovodrun -np 5 -H a:4,b:1 --mpi '--binding-args={OPTIONS}' {TRAIN} --schedule 'warmup:1ep cosine'",
        ),
        (
            "-H a:1,b:1 --controller mpi --nic eth0 --ssh-port 2222 --dry-run digits",
            "BIN/horovodrun -np 2 -H a:1,b:1 --mpi --network-interfaces eth0 --ssh-port 2222 "
            f"'--binding-args={OPTIONS}' {shlex.quote('--mpi-args=' + DAEMONS)} {TRAIN}",
        ),
        (
            "--launcher mpirun -np 2 --dry-run digits",
            f"BIN/mpirun -np 2 -H localhost:2 {OPTIONS} --tag-output {FORWARD} {TRAIN}",
        ),
        (
            "--launcher mpirun -H a:1,b:1 --nic eth0 --ssh-port 2222 --dry-run digits",
            f"BIN/mpirun -np 2 -H a:1,b:1 {OPTIONS} --tag-output {DAEMONS} "
            f"--mca btl_tcp_if_include eth0 -x NCCL_SOCKET_IFNAME=eth0 {FORWARD} {TRAIN}",
        ),
    ],
)
def test_dry_run(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, line: str) -> None:
    assert launch(arguments) == 0
    assert capsys.readouterr().out == line.replace("BIN", str(folder)) + "\n"


def test_loopback_is_only_for_the_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--launcher mpirun -np 2 --nic lo --dry-run digits") == 0
    line = capsys.readouterr().out
    assert "btl_tcp_if_include lo" in line and "oob_tcp_if_include" not in line


def test_mpirun_as_root(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert launch("--launcher mpirun -np 2 --dry-run digits") == 0
    assert f" {OPTIONS} --allow-run-as-root --tag-output " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--dry-run digits", "-np is needed: how many ranks, for example -np 4 (or -H host:4)"),
        ("-np 3 -H a:2 digits", "-np 3 is more than the 2 slots of the hosts given"),
        ("-H a:2 --hostfile f digits", "give -H or --hostfile, not both"),
        (
            "-np 2 --launcher mpirun --controller gloo digits",
            "--controller gloo needs --launcher horovodrun; under mpirun it is mpi",
        ),
        ("-np 2", "Missing argument 'RECIPE'."),
        ("-np 2 --dry-run digits --epoks 3", "no option '--epoks'; did you mean '--epochs'?"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, error: str) -> None:
    assert launch(arguments) == 2
    assert capsys.readouterr().err == f"hvdtrain: error: {error}\n"


def test_unknown_option_before_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("-np 2 --hostfil f digits") == 2
    # The words are click's and differ from version to version.
    (line,) = capsys.readouterr().err.splitlines()
    assert "--hostfil" in line and "Did you mean" in line and "--hostfile" in line


def test_launcher_is_found_beside_python_else_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "mpirun").touch(0o755)
    monkeypatch.setitem(os.environ, "PATH", str(other))
    assert find_program("mpirun") == str(folder / "mpirun")
    (folder / "mpirun").unlink()
    assert find_program("mpirun") == str(other / "mpirun")
    (folder / "horovodrun").unlink()
    with pytest.raises(UserError, match=r"horovodrun is neither beside .* nor on the PATH; `hvdtrain horovod build`"):
        find_program("horovodrun")


def test_environment_of_the_ranks(folder: Path) -> None:
    env = rank_environment({"PATH": "/bin", "LSB_JOBID": "7", "NCCL_DEBUG": "INFO", "SECRET": "x"}, "mpirun", "mpi")
    assert env["PATH"] == f"{folder}{os.pathsep}/bin"
    assert env["HVDTRAIN_LAUNCH"] == env["PYTHONUNBUFFERED"] == "1"
    assert "LSB_JOBID" not in env
    assert env["SECRET"] == "x"
    assert "NCCL_DEBUG" in forwarded(env) and "SECRET" not in forwarded(env)
    assert "PYTHONUNBUFFERED" not in rank_environment({"PYTHONUNBUFFERED": "1"}, "horovodrun", "gloo")


def test_launch_imports_no_framework() -> None:
    code = "import sys, hvdtrain.cli.launch; assert not {'torch', 'horovod', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
