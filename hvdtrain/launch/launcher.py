"""What starts the ranks: the interface of a launcher, and the registry in which launchers are found.

    hvdtrain launch                    the launcher (a program)                  each rank
    ===============                    ========================                  =========
    command_line(plan)  ------------->  mpirun -np 4 -H a:2,b:2 ...  ---------->  plan.command
    prepare_environment(environ)  --->  its environment  -------- some -------->  HVDTRAIN_*, HOROVOD_*, PATH, ...

    output.label       <--------------  "[1]<stdout>:text"  <-------------------  "text", or a message to launch
    output.rank_exits  <--------------  "Process 1 exit with status code 3."  <-  exit code
    output.lost_hosts  <--------------  "lost communication with ... node b"

    to stop the ranks:
      batch_system is None  --------------- kill here, ssh to other hosts ----->  SIGTERM, SIGUSR1, SIGKILL
      batch_system = "..."  --------->  relayed_stop_signal  ------------------>  SIGUSR1

The ranks must find `HOROVOD_RANK` and the like in their environment, or be started by MPI or by Slurm: see
`hvdtrain.comm.world`. A launcher is one file in `hvdtrain/launch/launchers/`, or one of another distribution, named in
its entry point group `hvdtrain.launchers`:

    @register_launcher
    class Flux(Launcher):
        name = "flux"
        help = "Flux's `flux run`."
        batch_system = "flux"

        def command_line(self, plan):
            return [self.find_program(), "run", f"-n{plan.num_ranks}", *plan.command]
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from hvdtrain.launch.hosts import Host
from hvdtrain.launch.output import DEFAULT_FORMAT, OutputFormat
from hvdtrain.system.errors import UserError
from hvdtrain.system.plugins import Registry
from hvdtrain.system.ssh import DEFAULT_SSH, Ssh


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What a launcher is to start, and how.

    Attributes:
        hosts: where ranks run, each with as many slots as it gets ranks; one host `localhost` is this host, or, for a
            launcher with a batch system, any that it chooses.
        command: what each rank runs.
        environ: the environment that the launcher will run in.
        controller: how ranks on CPUs communicate: `gloo` or `mpi`.
        nic: the network interface to use, or None for the launcher's own choice.
        ssh: how other hosts are reached.
        forward_env: variables for the ranks beyond those that always go to them.
    """

    hosts: Sequence[Host]
    command: Sequence[str]
    environ: Mapping[str, str]
    controller: str = "gloo"
    nic: str | None = None
    ssh: Ssh = DEFAULT_SSH
    forward_env: Sequence[str] = ()

    @property
    def num_ranks(self) -> int:
        return sum(host.slots for host in self.hosts)


class Launcher(Protocol):
    """A program that starts one process for each slot of some hosts. What is not required has a default here."""

    name: ClassVar[str]  # required: the value of --launcher, and the program's name
    help: ClassVar[str]  # required: a sentence for --help
    install_hint: ClassVar[str] = ""  # ends the message that there is no such program
    controllers: ClassVar[tuple[str, ...]] = ("gloo",)  # of gloo and mpi, the ones it can work with; first the default
    output: ClassVar[OutputFormat] = DEFAULT_FORMAT
    # The batch system (a name of --from) that it is a part of, as srun is of Slurm. Such a launcher reaches hosts
    # without ssh, may choose them itself, passes a signal on to all ranks, and ends these when it is ended.
    batch_system: ClassVar[str | None] = None
    relayed_stop_signal: ClassVar[signal.Signals] = signal.SIGUSR1  # which it passes on, if it has a batch system
    environment_prefixes: ClassVar[tuple[str, ...]] = ()  # of its own variables, which it needs in a run over hosts
    supports_elastic: ClassVar[bool] = False  # has `elastic_command_line`

    def command_line(self, plan: LaunchPlan) -> list[str]:
        """Return the command line that runs `plan.command` once in each slot of `plan.hosts`.

        No value of a variable may be on it: all users of a host can read command lines. Raises UserError if the
        launcher is not installed.
        """
        ...

    def elastic_command_line(self, plan: LaunchPlan, ranks: tuple[int, int | None], discovery: str) -> list[str]:
        """Return the command line that runs `plan.command` in each slot of hosts that come and go.

        Args:
            plan: its hosts do not matter.
            ranks: the least and the greatest number of ranks; None for any.
            discovery: a shell command that prints the current hosts, `host:slots` on a line, each time it is run.
        """
        raise NotImplementedError

    def prepare_environment(self, environ: dict[str, str], controller: str) -> None:
        """Change the environment that the launcher and its ranks get, in place."""

    def check_environment(self, environ: Mapping[str, str], controller: str) -> None:
        """Raise UserError if the launcher cannot work in this process's environment."""

    def check_installation(self) -> None:
        """Raise UserError if what is installed must not be used; called before ranks start, not for a dry run."""

    def uses_ssh(self, environ: Mapping[str, str]) -> bool:
        """Return whether it reaches other hosts by ssh, which is then checked before it is started."""
        return self.batch_system is None

    def find_program(self) -> str:
        """Return the path of the program: next to this Python, else on PATH. Raises UserError if there is none."""
        found = shutil.which(self.name, path=str(bin_folder())) or shutil.which(self.name)
        if not found:
            hint = f"; {self.install_hint}" if self.install_hint else ""
            raise UserError(f"{self.name} is neither next to {sys.executable} nor on PATH{hint}")
        return found


LAUNCHERS: Registry[Launcher] = Registry("launcher", "hvdtrain.launchers", "hvdtrain.launch.launchers")

L = TypeVar("L", bound=Launcher)


def register_launcher(launcher: type[L]) -> type[L]:
    """Make a launcher available to --launcher, under its name."""
    LAUNCHERS.register(launcher.name, launcher())
    return launcher


def choose_controller(launcher: Launcher, controller: str | None) -> str:
    """Return the controller to use: the one that was asked for, or the launcher's default.

    Raises:
        UserError: the launcher cannot work with it.
    """
    if controller is None or controller in launcher.controllers:
        return controller or launcher.controllers[0]
    others = [name for name, other in sorted(LAUNCHERS.load_all().items()) if controller in other.controllers]
    raise UserError(
        f"--controller {controller} needs --launcher {' or '.join(others)}; "
        f"with {launcher.name} it is {' or '.join(launcher.controllers)}"
    )


def hvdtrain_command(args: Sequence[str]) -> list[str]:
    """Return what each rank runs: this Python and `hvdtrain ARGS`."""
    return [sys.executable, "-m", "hvdtrain", *args]


def bin_folder() -> Path:
    """Return the folder of this Python: a virtual environment's own, not that of the Python that it links to."""
    return Path(sys.executable).parent
