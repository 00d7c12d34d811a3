"""The one exact command line that starts the ranks, and the environment that it runs in."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdtrain.errors import UserError
from hvdtrain.launch.hosts import Host, host_text

# mpirun gives remote ranks only the variables that it is told to; horovodrun gives them all.
OURS = ("HVDTRAIN_", "HOROVOD_", "NCCL_", "GLOO_", "UCX_")
FORWARDED = (*OURS, "OMP_", "MKL_", "MALLOC_", "PYTHON", "PYTORCH_", "TORCH_")
FORWARDED_NAMES = {"PATH", "LD_LIBRARY_PATH"}


def hvdtrain_command(args: Sequence[str]) -> list[str]:
    """What each rank runs: this Python and `hvdtrain ARGS`."""
    return [sys.executable, "-m", "hvdtrain", *args]


def rank_environment(environ: Mapping[str, str], launcher: str, controller: str) -> dict[str, str]:
    """The environment for the launcher and its ranks, from this process's."""
    env = dict(environ)
    # This Python's tools come first: the virtual environment need not be active.
    env["PATH"] = os.pathsep.join([str(bin_folder()), *filter(None, [env.get("PATH")])])
    env["HVDTRAIN_LAUNCH"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    if (launcher, controller) == ("horovodrun", "gloo"):
        # horovodrun sets it for the ranks; itself unbuffered, it would mix long lines of different ranks.
        del env["PYTHONUNBUFFERED"]
    # horovodrun stops reading a rank whose output is not UTF-8, whatever the locale of the rank's host.
    env["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    # A rank whose peer died says so in a line of C++; that is no news where the cause is shown.
    env.setdefault("HOROVOD_LOG_LEVEL", "fatal")
    # With LSF's job id, horovodrun asks LSF for things that it does not need here, and fails.
    env.pop("LSB_JOBID", None)
    return env


def command_line(
    launcher: str,
    controller: str,
    hosts: Sequence[Host],
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    nic: str | None = None,
    ssh_port: int | None = None,
) -> list[str]:
    """The command line by which `launcher` runs `command` once in each slot of `hosts`.

    `environ` is what the launcher will run in: mpirun is told which of its variables to forward.
    Raises UserError if there is no such launcher.
    """
    program = find_program(launcher)
    where = ["-np", str(sum(host.slots for host in hosts)), "-H", host_text(hosts)]
    if launcher == "mpirun":
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        options = ["--bind-to", "none", "--map-by", "slot", *root, "--tag-output", *mpi_daemons(nic, ssh_port)]
        if nic:
            options += ["--mca", "btl_tcp_if_include", nic]
            options += ["-x", f"NCCL_SOCKET_IFNAME={nic}"]
        for name in forwarded(environ):
            if not (nic and name == "NCCL_SOCKET_IFNAME"):
                options += ["-x", name]
        return [program, *where, *options, *command]
    options = [f"--{controller}"]
    if [host.name for host in hosts] == ["localhost"]:
        nic = None  # horovodrun takes the loopback then, and fails if told of another interface
    if nic:
        options += ["--network-interfaces", nic]
    if ssh_port:
        options += ["--ssh-port", str(ssh_port)]
    if controller == "mpi":
        # Open MPI 5 fails on horovodrun's own single-dash binding options, and overlooks its way to give the ssh port.
        options.append("--binding-args=--bind-to none --map-by slot")
        daemons = mpi_daemons(nic, ssh_port)
        if daemons:
            options.append(f"--mpi-args={shlex.join(daemons)}")
    return [program, *where, *options, *command]


def mpi_daemons(nic: str | None, ssh_port: int | None) -> list[str]:
    """Open MPI 5's options for how its daemons reach each other: the network interface and the ssh port."""
    options = []
    if nic and nic != "lo":  # which they refuse
        options += ["--prtemca", "oob_tcp_if_include", nic]
    if ssh_port:
        options += ["--prtemca", "plm_ssh_args", f"-p {ssh_port}"]
    return options


def forwarded(environ: Mapping[str, str]) -> list[str]:
    """The names of the variables that ranks on other hosts need."""
    return sorted(name for name in environ if name in FORWARDED_NAMES or name.startswith(FORWARDED))


def find_program(name: str) -> str:
    """The path of a launcher: beside this Python, else on the PATH.

    Raises UserError if it is in neither.
    """
    found = shutil.which(name, path=str(bin_folder())) or shutil.which(name)
    if not found:
        remedy = "; `hvdtrain horovod build` installs it" if name == "horovodrun" else ""
        raise UserError(f"{name} is neither beside {sys.executable} nor on the PATH{remedy}")
    return found


def bin_folder() -> Path:
    """The folder of this Python: a virtual environment's own, not that of the Python that it links to."""
    return Path(sys.executable).parent
