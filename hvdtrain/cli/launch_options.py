"""The options that say where ranks run and what starts them: of `hvdtrain launch`, and of others that start ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.options import HostSource, LaunchOptions
from hvdtrain.launch.scheduler import SCHEDULERS
from hvdtrain.system.plugins import Registry
from hvdtrain.system.ssh import Ssh

F = TypeVar("F", bound=Callable[..., Any])


class ComponentName(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """The name of a registered component, or one of some other words. Its metavar lists them when help is printed."""

    name = "name"

    def __init__(self, registry: Registry[Any], *words: str) -> None:
        self.registry = registry
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.words:
            self.registry.get(value)  # raises UserError
        return value

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join([*sorted(self.registry.names()), *self.words])}]"


class ComponentOption(click.Option):
    """An option that takes a component's name; its help is made from that of the components when it is printed."""

    def __init__(self, *args: Any, describe: Callable[[], str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.describe = describe

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = self.describe()
        return super().get_help_record(ctx)


def describe_launchers() -> str:
    """Return the help of --launcher."""
    return " ".join(["What starts the ranks.", *(one.help for _, one in sorted(LAUNCHERS.load_all().items()))])


def describe_schedulers() -> str:
    """Return the help of --from."""
    slots = "; ".join(f"{name}: {one.slots_help}" for name, one in sorted(SCHEDULERS.load_all().items()))
    return f"Hosts: those of the batch job that this runs in; auto finds its kind. Slots: {slots}."


LAUNCH_OPTIONS = (
    click.option(
        "-np",
        "num_ranks",
        type=click.IntRange(min=1),
        metavar="N",
        help="Ranks. Needed unless -H, --hostfile or --from gives hosts; then the default is all their slots.",
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
        "scheduler",
        cls=ComponentOption,
        type=ComponentName(SCHEDULERS, "auto"),
        describe=describe_schedulers,
    ),
    click.option(
        "--launcher",
        cls=ComponentOption,
        type=ComponentName(LAUNCHERS),
        describe=describe_launchers,
        default="horovodrun",
        show_default=True,
    ),
    click.option(
        "--controller",
        type=click.Choice(["gloo", "mpi"]),
        help="How ranks on CPUs communicate. Default: gloo; with mpirun always mpi, with srun always gloo.",
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
        help="The private key for ssh. ~/.ssh/config applies in any case.",
    ),
    click.option(
        "--env", "forward_env", multiple=True, metavar="NAME", help="Pass this variable to the ranks. Can be repeated."
    ),
    click.option("--dry-run", is_flag=True, help="Print the exact command line, and start nothing."),
)
LAUNCH_OPTION_NAMES = (
    *("num_ranks", "hosts", "hostfile", "scheduler", "launcher", "controller", "nic"),
    *("ssh_port", "ssh_identity", "forward_env", "dry_run"),
)


def add_launch_options(function: F) -> F:
    """Give a command the options that say where ranks run; it gets them as `launch_options`, a LaunchOptions."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in LAUNCH_OPTION_NAMES if name in kwargs}
        return function(*args, launch_options=parse_launch_options(given), **kwargs)

    for option in reversed(LAUNCH_OPTIONS):
        command = option(command)
    return command  # type: ignore[return-value]


def parse_launch_options(given: dict[str, Any]) -> LaunchOptions:  # click's values of options of many types
    """Return the options of a command line; those that a command does not have keep their defaults."""
    source = HostSource(**{name: given.pop(name) for name in ("hosts", "hostfile", "scheduler")})
    ssh = Ssh(given.pop("ssh_port"), given.pop("ssh_identity"))
    return LaunchOptions(launcher=LAUNCHERS.get(given.pop("launcher")), source=source, ssh=ssh, **given)
