"""`hvdtrain launch`: start `hvdtrain train` on many ranks and hosts; and how other commands start themselves there."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from hvdtrain.errors import EXIT_FAILED, UserError
from hvdtrain.launch.command import command_line, hvdtrain_command, rank_environment
from hvdtrain.launch.hosts import parse_hosts, place, read_hostfile
from hvdtrain.launch.run import run

F = TypeVar("F", bound=Callable[..., Any])

# As `start` takes them.
WHERE = (
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
        "--launcher",
        type=click.Choice(["horovodrun", "mpirun"]),
        default="horovodrun",
        show_default=True,
        help="What starts the ranks. mpirun is Open MPI 5 or later.",
    ),
    click.option(
        "--controller",
        type=click.Choice(["gloo", "mpi"]),
        help="How ranks on CPUs talk. Default: gloo; under mpirun always mpi.",
    ),
    click.option("--nic", metavar="NAME", help="The network interface to use; it has this name on every host."),
    click.option("--ssh-port", type=click.IntRange(1, 65535), metavar="N", help="The port of ssh on the other hosts."),
    click.option("--dry-run", is_flag=True, help="Print the exact command line, and start nothing."),
)
WHERE_NAMES = ("ranks", "hosts", "hostfile", "launcher", "controller", "nic", "ssh_port", "dry_run")


def launch_options(function: F) -> F:
    """Give a command the options that say where ranks run and what starts them."""
    for option in reversed(WHERE):
        function = option(function)
    return function


@click.command(
    "launch",
    context_settings={"allow_interspersed_args": False, "max_content_width": 100},
    options_metavar="[LAUNCH OPTIONS]",
)
@launch_options
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
def command(recipe: str, train_args: tuple[str, ...], **where: Any) -> int:
    """Start `hvdtrain train RECIPE` on many ranks and hosts.

    Launch options stand before RECIPE; all that follows RECIPE goes to `hvdtrain train` as it is, after a check here.
    The other hosts are reached by ssh, without a password, and have this Python and this folder at the same paths.

    \b
    hvdtrain launch -np 4 digits --epochs 5              four ranks on this host
    hvdtrain launch -H a:8,b:8 --nic eth0 digits         sixteen ranks on two hosts
    hvdtrain launch --hostfile hosts --launcher mpirun digits --resume

    Each line that a rank prints appears as `[rank] line`. horovodrun hands all environment variables on to the ranks;
    mpirun hands those on whose names begin with HVDTRAIN_, HOROVOD_, NCCL_, GLOO_, UCX_, OMP_, MKL_, MALLOC_, PYTHON,
    PYTORCH_ or TORCH_, and PATH and LD_LIBRARY_PATH.

    Ctrl-C or SIGTERM lets the ranks finish their step and save; a second one ends them at once.

    Exit codes: 0 trained; 1 a rank failed, and which one and why is shown; 2 a mistake in the command line;
    75 saved and to be run again with --resume; 130 or 143 ended at once by Ctrl-C or SIGTERM.
    """
    args = [recipe, *train_args]
    return start(["train", *args], lambda: check_train_arguments(args), **where)


def start(
    args: Sequence[str],
    check: Callable[[], object],
    *,
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    launcher: str,
    controller: str | None,
    nic: str | None,
    ssh_port: int | None,
    dry_run: bool,
    grace: float = 30.0,
) -> int:
    """Run `hvdtrain ARGS` on each rank, and return the exit code.

    check: called before any rank starts; raises UserError for a mistake in args.
    """
    if hosts is not None and hostfile is not None:
        raise UserError("give -H or --hostfile, not both")
    if launcher == "mpirun" and controller == "gloo":
        raise UserError("--controller gloo needs --launcher horovodrun; under mpirun it is mpi")
    controller = "mpi" if launcher == "mpirun" else controller or "gloo"
    listed = parse_hosts(hosts) if hosts is not None else read_hostfile(hostfile) if hostfile is not None else []
    placed = place(listed, ranks)
    # Before the check: importing the recipe may change this process's environment.
    environ = rank_environment(os.environ, launcher, controller)
    check()
    line = command_line(launcher, controller, placed, hvdtrain_command(args), environ, nic=nic, ssh_port=ssh_port)
    if dry_run:
        click.echo(shlex.join(line))
        return 0
    try:
        return run(line, environ, placed, ssh_port=ssh_port, grace=grace)
    except BrokenPipeError:
        # Nobody reads the output: `hvdtrain launch ... | head`. Python's last flush must not complain of it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def check_train_arguments(args: list[str]) -> None:
    """Refuse a mistake in the arguments of `hvdtrain train` before any rank starts.

    Raises UserError or a click error.
    """
    from hvdtrain.cli.train import check_arguments

    check_arguments(args)
