"""`hvdtrain launch` up to the command line that it would run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest

from hvdtrain.cli.main import main
from hvdtrain.launch.environment import forwarded_variables, rank_environment
from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.system.errors import UserError
from tests.support.limits import stretch

TRAIN = "BIN/python -m hvdtrain train digits"
OPTIONS = "--bind-to none --map-by slot"
DAEMONS = "--prtemca oob_tcp_if_include eth0 --prtemca plm_ssh_args '-p 2222'"
FORWARD = "-x HOROVOD_LOG_LEVEL -x HVDTRAIN_LAUNCH -x HVDTRAIN_SECRET -x OMP_NUM_THREADS -x PATH"
FORWARD += " -x PYTHONIOENCODING -x PYTHONUNBUFFERED"
ADDRESSES = {"localhost": "127.0.0.1", "a": "10.213.0.1", "b": "10.213.0.2"}
SRUN = "--mpi=none --label --kill-on-bad-exit=1 --export=ALL"
HOROVODRUN, MPIRUN = LAUNCHERS.get("horovodrun"), LAUNCHERS.get("mpirun")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python's folder with both launchers, a plain environment, and a `hvdtrain train` that notes what it checks."""
    for name in ("python", "horovodrun", "mpirun", "srun", "key"):
        (tmp_path / name).touch(0o755)
    train = ModuleType("hvdtrain.cli.train")
    train.check_arguments = check_arguments  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hvdtrain.cli.train", train)
    monkeypatch.setattr("hvdtrain.system.network.resolve_address", ADDRESSES.__getitem__)
    monkeypatch.setattr("hvdtrain.launch.start.interface_toward", lambda hosts: "ib0")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "HOME": "/home/me"})
    return tmp_path


def check_arguments(args: list[str], elastic: bool = False) -> SimpleNamespace:
    os.environ["OMP_NUM_THREADS"] = "64"  # what importing a recipe does here is not for the ranks
    if "--dry-run" in args:
        raise UserError("no option --dry-run") from click.NoSuchOption("--dry-run")
    if "--epoks" in args:
        raise UserError("no option '--epoks'; did you mean '--epochs'?")
    return SimpleNamespace(given_options={})


def launch(arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["launch", *shlex.split(arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("-np 4 --dry-run digits", f"BIN/horovodrun -np 4 -H localhost:4 --gloo --disable-cache {TRAIN}"),
        ("-np 4 --nic eth0 --dry-run digits", f"BIN/horovodrun -np 4 -H localhost:4 --gloo --disable-cache {TRAIN}"),
        (
            "-H a:4,b:4 --nic eth0 --ssh-port 2222 --dry-run digits --epochs 5 --unknown -np 3 --help",
            "BIN/horovodrun -np 8 -H a:4,b:4 --gloo --disable-cache --network-interfaces eth0 --ssh-port 2222 "
            f"{TRAIN} --epochs 5 --unknown -np 3 --help",
        ),
        (
            "-np 5 -H a:4,b:4 --controller mpi --dry-run digits --schedule 'warmup:1ep cosine'",
            "BIN/horovodrun -np 5 -H a:4,b:1 --mpi --disable-cache --network-interfaces ib0 "
            f"'--binding-args={OPTIONS}' '--mpi-args=--prtemca oob_tcp_if_include ib0' "
            f"{TRAIN} --schedule 'warmup:1ep cosine'",
        ),
        (
            "-H a:1,b:1 --controller mpi --nic eth0 --ssh-port 2222 --dry-run digits",
            "BIN/horovodrun -np 2 -H a:1,b:1 --mpi --disable-cache --network-interfaces eth0 --ssh-port 2222 "
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
        (
            "-H a:1,b:2 --ssh-identity BIN/key --dry-run digits",
            "BIN/horovodrun -np 3 -H a:1,b:2 --gloo --disable-cache --network-interfaces ib0 "
            f"--ssh-identity-file BIN/key {TRAIN}",
        ),
        (
            "-H a:1,b:1 --launcher mpirun --ssh-port 2222 --ssh-identity BIN/key --env HOME --dry-run digits",
            f"BIN/mpirun -np 2 -H a:1,b:1 {OPTIONS} --tag-output --prtemca oob_tcp_if_include ib0 "
            "--prtemca plm_ssh_args '-p 2222 -i BIN/key' --mca btl_tcp_if_include ib0 -x NCCL_SOCKET_IFNAME=ib0 "
            f"-x HOME {FORWARD} {TRAIN}",
        ),
        (
            "--epochs 5 -np 2 --no-ledger --dry-run digits --lr=1",
            f"BIN/horovodrun -np 2 -H localhost:2 --gloo --disable-cache {TRAIN} --epochs 5 --no-ledger --lr=1",
        ),
        ("--launcher srun -np 2 --dry-run digits", f"BIN/srun --ntasks=2 {SRUN} {TRAIN}"),
        (
            "--launcher srun -H a:2,b:1 --nic eth0 --dry-run digits",
            "BIN/srun --ntasks=3 --nodes=2 --distribution=arbitrary --nodelist=a,a,b "
            f"{SRUN},HOROVOD_GLOO_IFACE=eth0,NCCL_SOCKET_IFNAME=eth0 {TRAIN}",
        ),
        (
            "--elastic --min-np 2 -H a:2,b:2 --ssh-port 2222 --ssh-identity BIN/key --dry-run digits",
            "BIN/horovodrun --gloo -np 2 --min-np 2 --blacklist-cooldown-range 10 300 "
            "--host-discovery-script 'BIN/python -m hvdtrain.launch.discovery.debounce --hosts a:2,b:2' "
            f"--network-interfaces ib0 --ssh-port 2222 --ssh-identity-file BIN/key {TRAIN}",
        ),
    ],
)
def test_dry_run_prints_the_exact_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, line: str
) -> None:
    assert launch(arguments.replace("BIN", str(folder))) == 0
    assert capsys.readouterr().out == line.replace("BIN", str(folder)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "variables", "line"),
    [
        (
            "--from slurm",
            {"SLURM_JOB_NODELIST": "a,b", "SLURM_TASKS_PER_NODE": "2,1"},
            f"BIN/horovodrun -np 3 -H a:2,b:1 --gloo --disable-cache --network-interfaces ib0 {TRAIN}",
        ),
        (
            "--launcher srun",
            {"SLURM_JOB_NODELIST": "a,b", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_CPUS_PER_TASK": "4"},
            "BIN/srun --ntasks=4 --nodes=2 --distribution=arbitrary --nodelist=a,a,b,b --cpus-per-task=4 "
            f"{SRUN} {TRAIN}",
        ),
        (
            "--from auto",
            {"PBS_NODEFILE": "BIN/nodes"},
            f"BIN/horovodrun -np 3 -H a:2,b:1 --gloo --disable-cache --network-interfaces ib0 {TRAIN}",
        ),
    ],
)
def test_dry_run_in_a_job(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, variables: dict[str, str], line: str
) -> None:
    (folder / "nodes").write_text("a\na\nb\n")
    os.environ.update({name: value.replace("BIN", str(folder)) for name, value in variables.items()})
    assert launch(f"{arguments} --dry-run digits") == 0
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
            "--controller gloo needs --launcher horovodrun or srun; with mpirun it is mpi",
        ),
        (
            "-np 2 --launcher srun --controller mpi digits",
            "--controller mpi needs --launcher horovodrun or mpirun; with srun it is gloo",
        ),
        ("-np 2 --env NONE digits", "--env NONE: there is no such variable in the environment"),
        (
            "-np 2 --env A=b digits",
            "--env A=b: there is no such variable in the environment; give the name alone, its value is taken from the "
            "environment",
        ),
        ("-np 2 --ssh-identity /none digits", "--ssh-identity /none: there is no such file"),
        ("-np 2 --from slurm digits", "--from slurm: SLURM_JOB_NODELIST is not set: this is not within such a job"),
        (
            "--from auto digits",
            "--from auto: none is set of PBS_NODEFILE (pbs), LSB_DJOB_HOSTFILE (lsf), PE_HOSTFILE (sge), "
            "SLURM_JOB_NODELIST (slurm)",
        ),
        ("-H a:2 --from auto digits", "give -H or --from, not both"),
        ("-np 2", "RECIPE is missing; `hvdtrain list` shows those found"),
        ("digits -np 2 --epochs 3", "-np goes before RECIPE: hvdtrain launch -np 2 digits --epochs 3"),
        ("--dry-run digits -H a:2", "-H goes before RECIPE: hvdtrain launch --dry-run -H a:2 digits"),
        (
            "-np 2 digits --dry-run --lr 1",
            "--dry-run goes before RECIPE: hvdtrain launch -np 2 --dry-run digits --lr 1",
        ),
        (
            "-np 2 --width 3 digits",
            "--width before RECIPE is neither a launch option nor a run option; a recipe's own options come after it: "
            "hvdtrain launch [LAUNCH OPTIONS] RECIPE --width ..., and so do a program's",
        ),
        ("-np 2 --dry-run digits --epoks 3", "no option '--epoks'; did you mean '--epochs'?"),
    ],
)
def test_invalid_launch_options_are_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, error: str
) -> None:
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
    assert MPIRUN.find_program() == str(folder / "mpirun")
    (folder / "mpirun").unlink()
    assert MPIRUN.find_program() == str(other / "mpirun")
    (folder / "horovodrun").unlink()
    with pytest.raises(UserError, match=r"horovodrun is neither next to .* nor on PATH; `hvdtrain horovod build`"):
        HOROVODRUN.find_program()


def test_environment_of_the_ranks(folder: Path) -> None:
    env = rank_environment({"PATH": "/bin", "LSB_JOBID": "7", "NCCL_DEBUG": "INFO", "SECRET": "x"}, MPIRUN, "mpi")
    assert env["PATH"] == f"{folder}{os.pathsep}/bin"
    assert env["HVDTRAIN_LAUNCH"] == env["PYTHONUNBUFFERED"] == "1"
    assert "LSB_JOBID" not in env
    assert env["SECRET"] == "x"
    assert "NCCL_DEBUG" in forwarded_variables(env) and "SECRET" not in forwarded_variables(env)
    assert "SECRET" not in rank_environment({"PATH": "/bin", "SECRET": "x"}, HOROVODRUN, "gloo", multi_host=True)
    over = {
        "SECRET": "x",
        "OTHER": "y",
        "SSH_AUTH_SOCK": "s",
        "OMPI_MCA_a": "1",
        "SLURM_JOB_ID": "7",
        "VIRTUAL_ENV": "v",
    }
    gloo = rank_environment(over, HOROVODRUN, "gloo", multi_host=True, forward_env=["OTHER"])
    assert gloo.keys() & over.keys() == {"OTHER", "SSH_AUTH_SOCK", "VIRTUAL_ENV"}
    mpi = rank_environment(over, MPIRUN, "mpi", multi_host=True, forward_env=["OTHER"])
    assert mpi.keys() & over.keys() == over.keys() - {"SECRET"}
    assert {"OTHER", "VIRTUAL_ENV"} <= set(
        forwarded_variables(mpi, ["OTHER"])
    ) and "SLURM_JOB_ID" not in forwarded_variables(mpi, ["OTHER"])
    assert "PYTHONUNBUFFERED" not in rank_environment({"PYTHONUNBUFFERED": "1"}, HOROVODRUN, "gloo")


def test_each_launch_has_a_secret_of_its_own_unless_the_environment_has_one() -> None:
    first, second = (rank_environment({}, HOROVODRUN, "gloo")["HVDTRAIN_SECRET"] for _ in range(2))
    assert first != second and len(first) == 64
    mine = {"HVDTRAIN_SECRET": "m" * 32}
    assert rank_environment(mine, LAUNCHERS.get("srun"), "gloo", multi_host=True)["HVDTRAIN_SECRET"] == "m" * 32


def test_launch_imports_no_framework() -> None:
    code = "import sys, hvdtrain.cli.launch; assert not {'torch', 'horovod', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=stretch(60))
