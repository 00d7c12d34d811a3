"""horovodrun, Horovod's own launcher: over ssh with Gloo, or with MPI by starting mpirun itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import ClassVar

from hvdtrain.launch.hosts import format_hosts
from hvdtrain.launch.launcher import Launcher, LaunchPlan, register_launcher
from hvdtrain.launch.launchers import mpirun
from hvdtrain.launch.output import OutputFormat
from hvdtrain.native.installed import require_signed
from hvdtrain.system.ssh import Ssh

COOLDOWN_RANGE = (10, 300)  # seconds, least and most, until a host on which a process was lost is tried again
GLOO_RANK_EXIT = re.compile(r"\bProcess (?P<rank>\d+) exit with status code (?P<code>\d+)\.")


@register_launcher
class Horovodrun(Launcher):
    """The default. Its output is mpirun's with the MPI controller."""

    name: ClassVar[str] = "horovodrun"
    help: ClassVar[str] = "horovodrun is Horovod's."
    install_hint: ClassVar[str] = "`hvdtrain horovod build` installs it"
    controllers: ClassVar[tuple[str, ...]] = ("gloo", "mpi")
    output: ClassVar[OutputFormat] = OutputFormat(
        rank_exits=(GLOO_RANK_EXIT, *mpirun.RANK_EXITS), lost_hosts=mpirun.LOST_HOSTS
    )
    supports_elastic: ClassVar[bool] = True

    def command_line(self, plan: LaunchPlan) -> list[str]:
        line = [self.find_program(), "-np", str(plan.num_ranks), "-H", format_hosts(plan.hosts)]
        # Without its cache, ~/.horovod/cache.bin, which jobs that start at the same time break.
        line += [f"--{plan.controller}", "--disable-cache"]
        # On this host alone it takes the loopback interface, and fails if given another one.
        nic = plan.nic if [host.name for host in plan.hosts] != ["localhost"] else None
        if nic:
            line += ["--network-interfaces", nic]
        line += build_ssh_options(plan.ssh)
        if plan.controller == "mpi":
            # Open MPI 5 fails on horovodrun's own single-dash binding options, and ignores its way to pass ssh options.
            line.append("--binding-args=--bind-to none --map-by slot")
            daemons = mpirun.build_daemon_options(nic, plan.ssh)
            if daemons:
                line.append(f"--mpi-args={shlex.join(daemons)}")
        return [*line, *plan.command]

    def elastic_command_line(self, plan: LaunchPlan, ranks: tuple[int, int | None], discovery: str) -> list[str]:
        least, most = ranks
        line = [self.find_program(), "--gloo", "-np", str(least), "--min-np", str(least)]
        line += ["--max-np", str(most)] if most is not None else []
        line += ["--blacklist-cooldown-range", *map(str, COOLDOWN_RANGE), "--host-discovery-script", discovery]
        line += ["--network-interfaces", plan.nic or "lo", *build_ssh_options(plan.ssh)]
        return [*line, *plan.command]

    def prepare_environment(self, environ: dict[str, str], controller: str) -> None:
        if controller == "mpi":
            mpirun.put_site_mpi_first(environ)
        else:
            # It sets the variable for the ranks; itself unbuffered, it would mix long lines of different ranks.
            environ.pop("PYTHONUNBUFFERED", None)

    def check_environment(self, environ: Mapping[str, str], controller: str) -> None:
        if controller == "mpi":
            mpirun.check_home_directory(environ)

    def check_installation(self) -> None:
        require_signed()


def build_ssh_options(ssh: Ssh) -> list[str]:
    """Return horovodrun's options for ssh."""
    port = ["--ssh-port", str(ssh.port)] if ssh.port else []
    return port + (["--ssh-identity-file", str(ssh.identity)] if ssh.identity else [])
