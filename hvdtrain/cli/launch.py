"""`hvdtrain launch`: start `hvdtrain train` on many ranks and hosts; and how other commands start themselves there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from hvdtrain.doctor.preflight import check_hosts
from hvdtrain.launch.command import build_command_line, check_home_directory, hvdtrain_command
from hvdtrain.launch.elastic import ElasticOptions, run_with_relaunches
from hvdtrain.launch.elastic import build_elastic_command_line as elastic_command_line
from hvdtrain.launch.environment import rank_environment
from hvdtrain.launch.hosts import assign_slots
from hvdtrain.launch.job import HostLister
from hvdtrain.launch.run import run_launcher
from hvdtrain.launch.schedulers import SCHEDULER_VARIABLES, resolve_hosts
from hvdtrain.launch.screen import announce_start, format_rank_count
from hvdtrain.launch.signals import SignalInbox, exit_75_on_usr1
from hvdtrain.native.installed import require_signed
from hvdtrain.system.errors import UserError
from hvdtrain.system.network import interface_toward, is_local_host
from hvdtrain.system.ssh import Ssh

F = TypeVar("F", bound=Callable[..., Any])

# As `start` takes them.
LAUNCH_OPTIONS = (
    click.option(
        "-np", "ranks", type=click.IntRange(min=1), metavar="N", help="Ranks. Default: all slots of the hosts."
    ),
    click.option(
        "-H", "hosts", metavar="a:4,b:4", help="Hosts and their slots, one rank to a slot. Default: this host."
    ),
    click.option(
        "--hostfile",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Hosts, a line each: `host slots=4`, `host:4` or `host`; # starts a comment.",
    ),
    click.option(
        "--from",
        "source",
        type=click.Choice([*SCHEDULER_VARIABLES, "auto"]),
        help="Hosts: those of the batch job that this runs in; auto finds out of which kind it is.",
    ),
    click.option(
        "--launcher",
        type=click.Choice(["horovodrun", "mpirun", "srun"]),
        default="horovodrun",
        show_default=True,
        help="What starts the ranks. mpirun is Open MPI 5 or later; srun is Slurm's, and needs no ssh.",
    ),
    click.option(
        "--controller",
        type=click.Choice(["gloo", "mpi"]),
        help="How ranks on CPUs talk. Default: gloo; under mpirun always mpi, under srun always gloo.",
    ),
    click.option(
        "--nic",
        metavar="NAME",
        help="The network interface to use; it has this name on every host. Default: the one that leads to the others.",
    ),
    click.option("--ssh-port", type=click.IntRange(1, 65535), metavar="N", help="The port of ssh on the other hosts."),
    click.option(
        "--ssh-identity",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The private key for ssh. ~/.ssh/config counts in any case.",
    ),
    click.option(
        "--env", "extra", multiple=True, metavar="NAME", help="Hand this variable on to the ranks. Can be repeated."
    ),
    click.option("--dry-run", is_flag=True, help="Print the exact command line, and start nothing."),
)
LAUNCH_OPTION_NAMES = (
    *("ranks", "hosts", "hostfile", "source", "launcher", "controller", "nic"),
    *("ssh_port", "ssh_identity", "extra", "dry_run"),
)


def add_launch_options(function: F) -> F:
    """Give a command the options that say where ranks run and what starts them."""
    for option in reversed(LAUNCH_OPTIONS):
        function = option(function)
    return function


@click.command(
    "launch",
    context_settings={"allow_interspersed_args": False, "max_content_width": 100},
    options_metavar="[LAUNCH OPTIONS]",
)
@add_launch_options
@click.option("--elastic", is_flag=True, help="Let hosts come and go while it trains.")
@click.option("--min-np", "least", type=click.IntRange(min=1), metavar="N", help="Elastic: wait below so many ranks.")
@click.option("--max-np", "most", type=click.IntRange(min=1), metavar="N", help="Elastic: no more ranks than these.")
@click.option(
    "--discovery",
    type=click.Path(path_type=Path),
    metavar="SCRIPT",
    help="Elastic: a program that prints the hosts there are, `host:slots` a line; asked once a second.",
)
@click.option(
    "--relaunch",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Elastic: start a job that is lost as a whole again, from its newest checkpoint.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long ranks may take to save after Ctrl-C or SIGTERM.",
)
@click.argument("recipe")
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE OPTIONS] [RUN OPTIONS]")
def launch_command(
    recipe: str,
    train_args: tuple[str, ...],
    elastic: bool,
    least: int | None,
    most: int | None,
    discovery: Path | None,
    relaunch: int,
    **where: Any,
) -> int:
    """Start `hvdtrain train RECIPE` on many ranks and hosts.

    Launch options stand before RECIPE; all that follows RECIPE goes to `hvdtrain train` as it is, after a check here.
    The other hosts are reached by ssh, without a password, and have this Python and this folder at the same paths. This
    host need not be among those of -H.

    \b
    hvdtrain launch -np 4 digits --epochs 5              four ranks on this host
    hvdtrain launch -H a:8,b:8 --nic eth0 digits         sixteen ranks on two hosts
    hvdtrain launch --hostfile hosts --launcher mpirun digits --resume
    hvdtrain launch --from slurm --launcher srun digits  in a job script, a rank for each task
    hvdtrain launch --elastic --min-np 1 --max-np 8 --discovery ./hosts.sh --relaunch 5 digits

    Ranks on this host alone have your whole environment. Over several hosts, and under srun, ranks get the variables
    whose names begin with HVDTRAIN_, HOROVOD_, NCCL_, GLOO_, UCX_, OMP_, MKL_, MALLOC_, PYTHON, PYTORCH_ or TORCH_, and
    PATH, LD_LIBRARY_PATH, VIRTUAL_ENV, GLIBC_TUNABLES and CUBLAS_WORKSPACE_CONFIG; of others those that --env names,
    such as --env HF_HOME. Other secrets stay here. No value is on a command line, which
    all users of a host can read; mpirun and srun send them over the network as they are.

    With --from, hosts and slots are those of the job: Slurm's tasks (or its GPUs, where no tasks were asked for), the
    lines of the file of PBS or LSF, the slots of Grid Engine. An LSF host that can only launch is left out. Under srun,
    within a job, --from slurm is the default; outside of one, -np is enough, and Slurm chooses the nodes.

    Ctrl-C or SIGTERM lets the ranks finish their step and save; a second one ends them at once.

    Exit codes: 0 trained; 1 a rank failed, and which one and why is shown; 2 a mistake in the command line;
    75 saved, or not begun, and to be run again with --resume; 130 or 143 ended at once by Ctrl-C or SIGTERM.
    """
    args = [recipe, *train_args]
    with exit_75_on_usr1():
        if elastic:
            return launch_elastic(args, least or 1, most, discovery, relaunch, **where)
        only = (("--min-np", least), ("--max-np", most), ("--discovery", discovery), ("--relaunch", relaunch))
        for name, value in only:
            if value:
                raise UserError(f"{name} {value} goes with --elastic")
        return launch_ranks(["train", *args], lambda: check_train_arguments(args), **where)


def launch_ranks(
    args: Sequence[str],
    check: Callable[[], object],
    *,
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    source: str | None,
    launcher: str,
    controller: str | None,
    nic: str | None,
    ssh_port: int | None,
    ssh_identity: Path | None,
    extra: Sequence[str],
    dry_run: bool,
    grace: float = 30.0,
) -> int:
    """Run `hvdtrain ARGS` on each rank, and return the exit code.

    check: called before any rank starts; raises UserError for a mistake in args.
    """
    if launcher == "mpirun" and controller == "gloo":
        raise UserError("--controller gloo needs --launcher horovodrun or srun; under mpirun it is mpi")
    if launcher == "srun" and controller == "mpi":
        raise UserError("--controller mpi needs --launcher horovodrun or mpirun; under srun it is gloo")
    if launcher == "srun" and hosts is None and hostfile is None and "SLURM_JOB_NODELIST" in os.environ:
        source = source or "slurm"
    ssh = Ssh(ssh_port, ssh_identity)
    ssh.check_identity()
    controller = "mpi" if launcher == "mpirun" else controller or "gloo"
    if controller == "mpi":
        check_home_directory(os.environ)
    placed = assign_slots(resolve_hosts(hosts, hostfile, source, os.environ), ranks)
    away = launcher == "srun" or not all(is_local_host(host.name) for host in placed)
    if away and nic is None and launcher != "srun":
        nic = interface_toward(host.name for host in placed)
    # Before the check: importing the recipe may change this process's environment.
    environ = rank_environment(os.environ, launcher, controller, away=away, extra=extra)
    names = [host.name for host in placed]
    # srun needs no ssh, nor does mpirun where it knows the job's batch system. The doctor has asked more already.
    by_ssh = launcher == "horovodrun" or (
        launcher == "mpirun" and not any(map(os.environ.get, SCHEDULER_VARIABLES.values()))
    )
    ask_hosts = away and not dry_run and by_ssh and args[0] != "doctor"
    if not dry_run and args[0] == "train":  # others print tables that programs read
        announce_start(format_rank_count(sum(host.slots for host in placed)), launcher, names)
    check()  # first: a mistake in the arguments is reported before any host was asked
    if ask_hosts:
        check_hosts(names, args, nic=nic, ssh=ssh.ssh_arguments())
    command = hvdtrain_command(args)
    line = build_command_line(launcher, controller, placed, command, environ, nic=nic, ssh=ssh, extra=extra)
    if dry_run:
        click.echo(shlex.join(line))
        return 0
    if launcher == "horovodrun":
        require_signed()
    known = [] if launcher == "srun" and placed[0].name == "localhost" else placed
    return run_launcher(line, environ, known, ssh=ssh, grace=grace)[0]


def launch_elastic(
    args: list[str],
    least: int,
    most: int | None,
    discovery: Path | None,
    relaunch: int,
    *,
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    source: str | None,
    launcher: str,
    controller: str | None,
    nic: str | None,
    ssh_port: int | None,
    ssh_identity: Path | None,
    extra: Sequence[str],
    dry_run: bool,
    grace: float,
) -> int:
    """Run `hvdtrain train ARGS` elastically, and return the exit code."""
    if launcher != "horovodrun" or controller == "mpi":
        raise UserError("--elastic needs --launcher horovodrun and --controller gloo: MPI ends a job that loses a rank")
    if ranks is not None:
        raise UserError(f"-np {ranks} is a fixed number; --elastic takes --min-np and --max-np")
    if (discovery is not None) + (hosts is not None) + (hostfile is not None) + (source is not None) != 1:
        raise UserError("--elastic takes its hosts from one of --discovery, -H, --hostfile and --from: give one")
    ssh = Ssh(ssh_port, ssh_identity)
    ssh.check_identity()
    listed = resolve_hosts(hosts, hostfile, source, os.environ)
    elastic = ElasticOptions(least, most, discovery, listed)
    elastic.check_options()
    if nic is None:
        nic = interface_toward(elastic.current_hosts())
    away = discovery is not None or not all(is_local_host(host.name) for host in listed)
    environ = rank_environment(os.environ, launcher, "gloo", away=away, extra=extra)
    if not dry_run:
        where = [str(discovery)] if discovery else [host.name for host in listed]
        announce_start(f"{least} {f'to {most}' if most else 'or more'} elastic ranks", launcher, where)
    check_train_arguments(args, elastic=True)
    if relaunch and not any(arg == "--run-dir" or arg.startswith("--run-dir=") for arg in args):
        raise UserError("--relaunch needs --run-dir: the folder whose checkpoints the job goes on from")

    def build_train_command(resume: bool) -> list[str]:
        return hvdtrain_command(["train", *args, *(["--resume"] if resume and "--resume" not in args else [])])

    if dry_run:
        line = elastic_command_line(elastic, build_train_command(False), Path("hosts.json"), nic=nic, ssh=ssh)
        click.echo(shlex.join(line))
        return 0

    require_signed()

    def launch_once(
        line: list[str], environ: Mapping[str, str], caught: SignalInbox, listed: HostLister
    ) -> tuple[int, bool]:
        return run_launcher(line, environ, [], ssh=ssh, grace=grace, elastic=True, listed=listed, caught=caught)

    return run_with_relaunches(launch_once, elastic, build_train_command, environ, nic=nic, ssh=ssh, relaunch=relaunch)


def check_train_arguments(args: list[str], elastic: bool = False) -> None:
    """Refuse a mistake in the arguments of `hvdtrain train` before any rank starts.

    Raises UserError or a click error.
    """
    from hvdtrain.cli.train import check_arguments

    check_arguments(args, elastic)
