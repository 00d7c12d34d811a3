"""Batch systems: which hosts, with how many slots, they have given to the job that this process runs in.

    sbatch, qsub, bsub --> the job's environment --> Scheduler.variable is set? --> Scheduler.read_hosts --> --from

A scheduler is one file in `hvdtrain/launch/schedulers/`, or one of another distribution, named in its entry point group
`hvdtrain.schedulers`:

    @register_scheduler
    class Flux(Scheduler):
        name = "flux"
        variable = "FLUX_JOB_ID"
        slots_help = "its tasks"

        def read_hosts(self, environ):
            return [Host("a", 2), Host("b", 2)]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from hvdtrain.launch.hosts import Host
from hvdtrain.system.errors import UserError
from hvdtrain.system.plugins import Registry


class Scheduler(Protocol):
    """A batch system, as far as `hvdtrain launch --from` needs it."""

    name: ClassVar[str]  # the value of --from
    variable: ClassVar[str]  # the environment variable that is set in its jobs, and in no others
    slots_help: ClassVar[str]  # what a host's slots are, for --help, e.g. "its tasks"

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        """Return the job's hosts in the order in which ranks fill them; slots are the ranks each takes.

        Args:
            environ: the job's environment, in which `variable` is set.

        Raises:
            UserError: the environment, or a file that it names, is not understood.
        """
        ...


SCHEDULERS: Registry[Scheduler] = Registry("scheduler", "hvdtrain.schedulers", "hvdtrain.launch.schedulers")

S = TypeVar("S", bound=Scheduler)


def register_scheduler(scheduler: type[S]) -> type[S]:
    """Make a scheduler available to --from, under its name."""
    SCHEDULERS.register(scheduler.name, scheduler())
    return scheduler


def find_schedulers(environ: Mapping[str, str]) -> list[str]:
    """Return the names of the schedulers in whose jobs this process runs: usually none or one."""
    return [name for name, scheduler in SCHEDULERS.load_all().items() if environ.get(scheduler.variable)]


def read_allocated_hosts(name: str, environ: Mapping[str, str]) -> list[Host]:
    """Return the hosts of the job that this process runs in.

    Args:
        name: of a scheduler, or `auto` for the only one whose variable is set.
        environ: the job's environment.

    Raises:
        UserError: there is no such job, or what describes it is not understood.
    """
    if name == "auto":
        found = find_schedulers(environ)
        if len(found) > 1:
            raise UserError(
                f"--from auto: variables of several batch systems are set: {', '.join(found)}; name one of them"
            )
        if not found:
            known = ", ".join(f"{one.variable} ({one.name})" for one in SCHEDULERS.load_all().values())
            raise UserError(f"--from auto: none is set of {known}")
        name = found[0]
    scheduler = SCHEDULERS.get(name)
    if not environ.get(scheduler.variable):
        raise UserError(f"--from {name}: {scheduler.variable} is not set: this is not within such a job")
    return scheduler.read_hosts(environ)


def read_host_lines(variable: str, environ: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Yield each line of the file that a variable names, but empty ones, after where it is, for messages.

    Raises:
        UserError: the file cannot be read.
    """
    where = f"{variable} {environ[variable]}"
    try:
        text = Path(environ[variable]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{where} line {number}", line.strip()


def sum_slots(hosts: Iterable[Host], where: str) -> list[Host]:
    """Return each host once, with the slots of all its entries, in the order in which they come first.

    Raises:
        UserError: there are none; `where` begins the message.
    """
    slots: Counter[str] = Counter()
    for host in hosts:
        slots[host.name] += host.slots
    if not slots:
        raise UserError(f"{where}: there is no host in it")
    return [Host(name, number) for name, number in slots.items()]
