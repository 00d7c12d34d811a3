"""The one exact command line that starts the ranks."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence

from hvdtrain.launch.environment import bin_folder, forwarded_variables
from hvdtrain.launch.hosts import Host, format_hosts, hosts_by_rank
from hvdtrain.native.installed import find_site_mpi
from hvdtrain.system.errors import UserError
from hvdtrain.system.ssh import DEFAULT_SSH, Ssh


def hvdtrain_command(args: Sequence[str]) -> list[str]:
    """What each rank runs: this Python and `hvdtrain ARGS`."""
    return [sys.executable, "-m", "hvdtrain", *args]


def build_command_line(
    launcher: str,
    controller: str,
    hosts: Sequence[Host],
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    nic: str | None = None,
    ssh: Ssh = DEFAULT_SSH,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line by which `launcher` runs `command` once in each slot of `hosts`.

    `environ` is what the launcher will run in: mpirun is told which of its variables to forward, those named in `extra`
    among them. Raises UserError if there is no such launcher.
    """
    program = find_program(launcher)
    if launcher == "srun":
        return [program, *srun_options(hosts, environ, nic), *command]
    where = ["-np", str(sum(host.slots for host in hosts)), "-H", format_hosts(hosts)]
    if launcher == "mpirun":
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        options = ["--bind-to", "none", "--map-by", "slot", *root, "--tag-output", *mpi_daemon_options(nic, ssh)]
        if nic:
            options += ["--mca", "btl_tcp_if_include", nic]
            options += ["-x", f"NCCL_SOCKET_IFNAME={nic}"]
        for name in forwarded_variables(environ, extra):
            if not (nic and name == "NCCL_SOCKET_IFNAME"):
                options += ["-x", name]
        return [program, *where, *options, *command]
    options = [f"--{controller}", "--disable-cache"]  # ~/.horovod/cache.bin, which starts at one time break
    if [host.name for host in hosts] == ["localhost"]:
        nic = None  # horovodrun takes the loopback then, and fails if told of another interface
    if nic:
        options += ["--network-interfaces", nic]
    options += horovodrun_ssh_options(ssh)
    if controller == "mpi":
        # Open MPI 5 fails on horovodrun's own single-dash binding options, and overlooks its way to give ssh's options.
        options.append("--binding-args=--bind-to none --map-by slot")
        daemons = mpi_daemon_options(nic, ssh)
        if daemons:
            options.append(f"--mpi-args={shlex.join(daemons)}")
    return [program, *where, *options, *command]


def horovodrun_ssh_options(ssh: Ssh) -> list[str]:
    """horovodrun's options for ssh."""
    port = ["--ssh-port", str(ssh.port)] if ssh.port else []
    return port + (["--ssh-identity-file", str(ssh.identity)] if ssh.identity else [])


def mpi_daemon_options(nic: str | None, ssh: Ssh) -> list[str]:
    """Open MPI 5's options for how its daemons reach each other: the network interface, and ssh's options."""
    options = []
    if nic and nic != "lo":  # which they refuse
        options += ["--prtemca", "oob_tcp_if_include", nic]
    if ssh.ssh_arguments():
        options += ["--prtemca", "plm_ssh_args", " ".join(ssh.ssh_arguments())]
    return options


def srun_options(hosts: Sequence[Host], environ: Mapping[str, str], nic: str | None) -> list[str]:
    """srun's options for a rank in each slot; where Slurm is to choose the nodes, the only host is called localhost.

    The ranks get all of `environ`, by Slurm's own way, and find each other by Gloo: no PMI library is needed.
    """
    options = [f"--ntasks={sum(host.slots for host in hosts)}"]
    if [host.name for host in hosts] != ["localhost"]:
        # A name for each rank: the only form that allows different slots.
        names = ",".join(hosts_by_rank(hosts))
        options += [f"--nodes={len(hosts)}", "--distribution=arbitrary", f"--nodelist={names}"]
    if "SLURM_CPUS_PER_TASK" in environ:  # which steps do not take over from their job since Slurm 22.05
        options.append(f"--cpus-per-task={environ['SLURM_CPUS_PER_TASK']}")
    names = f",HOROVOD_GLOO_IFACE={nic},NCCL_SOCKET_IFNAME={nic}" if nic else ""
    return [*options, "--mpi=none", "--label", "--kill-on-bad-exit=1", f"--export=ALL{names}"]


def check_home_directory(environ: Mapping[str, str]) -> None:
    """Raise UserError if Open MPI would not find a home directory: it says so in a line among many others, and ends."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not environ.get("HOME"):
            raise UserError(
                f"mpirun needs a home directory: HOME is not set, and user {os.getuid()} has no entry in the password "
                "database; set HOME to a folder, or use --launcher horovodrun --controller gloo"
            ) from None


def find_program(name: str) -> str:
    """The path of a launcher: beside this Python, else on the PATH; mpirun of the MPI that Horovod was built with.

    Raises UserError if it is in neither.
    """
    mpi = find_site_mpi() if name == "mpirun" else None
    found = str(mpi.mpirun) if mpi else shutil.which(name, path=str(bin_folder())) or shutil.which(name)
    if not found:
        remedies = {"horovodrun": "; `hvdtrain horovod build` installs it", "srun": "; it is a part of Slurm"}
        remedy = remedies.get(name, "")
        raise UserError(f"{name} is neither beside {sys.executable} nor on the PATH{remedy}")
    return found
