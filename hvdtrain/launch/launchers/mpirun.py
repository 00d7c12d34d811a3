"""mpirun of Open MPI 5 or later: over ssh, or by the batch system in whose job it runs."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from typing import ClassVar

from hvdtrain.launch.environment import forwarded_variables
from hvdtrain.launch.hosts import format_hosts
from hvdtrain.launch.launcher import Launcher, LaunchPlan, register_launcher
from hvdtrain.launch.output import OutputFormat
from hvdtrain.launch.scheduler import find_schedulers
from hvdtrain.native.installed import find_site_mpi
from hvdtrain.native.mpi import DEFAULT_FOLDERS
from hvdtrain.system.errors import UserError
from hvdtrain.system.ssh import Ssh

PROCESS = r"process rank (?P<rank>\d+) with PID \d+ on node \S+"
RANK_EXITS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{PROCESS} exited on signal (?P<signal>\d+)",
        rf"due to {PROCESS} exiting improperly",  # with code 0
        r"Process name: \[[^\]]*,(?P<rank>\d+)\] Exit code: (?P<code>\d+)",
    )
)
# A host's daemon, which starts the ranks there.
LOST_HOSTS = tuple(
    re.compile(pattern)
    for pattern in (
        r"lost communication with a remote daemon\b.*? Remote daemon: \[\S+\] on node (?P<host>\S+)",
        r"daemon failed to report back after being spawned\..*? Remote host: (?P<host>\S+)",  # also of one that had
    )
)


@register_launcher
class Mpirun(Launcher):
    """Open MPI's launcher; ranks communicate by MPI, or by NCCL on GPUs."""

    name: ClassVar[str] = "mpirun"
    help: ClassVar[str] = "mpirun is Open MPI 5 or later."
    controllers: ClassVar[tuple[str, ...]] = ("mpi",)
    output: ClassVar[OutputFormat] = OutputFormat(rank_exits=RANK_EXITS, lost_hosts=LOST_HOSTS)

    def command_line(self, plan: LaunchPlan) -> list[str]:
        line = [self.find_program(), "-np", str(plan.num_ranks), "-H", format_hosts(plan.hosts)]
        line += ["--bind-to", "none", "--map-by", "slot"]
        line += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        line += ["--tag-output", *build_daemon_options(plan.nic, plan.ssh)]
        if plan.nic:
            line += ["--mca", "btl_tcp_if_include", plan.nic, "-x", f"NCCL_SOCKET_IFNAME={plan.nic}"]
        for name in forwarded_variables(plan.environ, plan.forward_env):
            if not (plan.nic and name == "NCCL_SOCKET_IFNAME"):
                line += ["-x", name]
        return [*line, *plan.command]

    def prepare_environment(self, environ: dict[str, str], controller: str) -> None:
        put_site_mpi_first(environ)

    def check_environment(self, environ: Mapping[str, str], controller: str) -> None:
        check_home_directory(environ)

    def uses_ssh(self, environ: Mapping[str, str]) -> bool:
        return not find_schedulers(environ)

    def find_program(self) -> str:
        mpi = find_site_mpi()
        return str(mpi.mpirun) if mpi else super().find_program()


def build_daemon_options(nic: str | None, ssh: Ssh) -> list[str]:
    """Return Open MPI 5's options for how its daemons reach each other: the network interface, and options of ssh."""
    options = []
    if nic and nic != "lo":  # which they reject
        options += ["--prtemca", "oob_tcp_if_include", nic]
    if ssh.ssh_arguments():
        options += ["--prtemca", "plm_ssh_args", " ".join(ssh.ssh_arguments())]
    return options


def put_site_mpi_first(environ: dict[str, str]) -> None:
    """Put the MPI that Horovod was built with first on PATH: horovodrun takes the first mpirun there."""
    mpi = find_site_mpi()
    if mpi and mpi.mpirun.parent not in DEFAULT_FOLDERS:
        environ["PATH"] = f"{mpi.mpirun.parent}{os.pathsep}{environ['PATH']}"


def check_home_directory(environ: Mapping[str, str]) -> None:
    """Raise UserError if Open MPI would not find a home directory: it would end with one line about it among many."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not environ.get("HOME"):
            raise UserError(
                f"mpirun needs a home directory: HOME is not set, and user {os.getuid()} has no entry in the password "
                "database; set HOME to a folder, or use --launcher horovodrun --controller gloo"
            ) from None
