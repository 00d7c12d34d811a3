"""The options of a launch: where ranks run, what starts them, and, for an elastic run, how many there may be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.launch.hosts import Host, parse_hosts, read_hostfile
from hvdtrain.launch.launcher import Launcher
from hvdtrain.launch.scheduler import SCHEDULERS, read_allocated_hosts
from hvdtrain.system.errors import UserError
from hvdtrain.system.ssh import DEFAULT_SSH, Ssh


@dataclass(frozen=True, kw_only=True)
class HostSource:
    """Where the list of hosts comes from; all None if it is not given."""

    hosts: str | None = None  # -H: a:4,b:4
    hostfile: Path | None = None  # --hostfile
    scheduler: str | None = None  # --from: the name of a scheduler, or auto

    def given_options(self) -> list[str]:
        """Return the options that were given."""
        options = {"-H": self.hosts, "--hostfile": self.hostfile, "--from": self.scheduler}
        return [name for name, value in options.items() if value is not None]

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        """Return the hosts and their slots; none if no source is given.

        Raises:
            UserError: several sources are given, or what one holds is not understood.
        """
        given = self.given_options()
        if len(given) > 1:
            raise UserError(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all of them'}")
        if self.hosts is not None:
            return parse_hosts(self.hosts)
        if self.hostfile is not None:
            return read_hostfile(self.hostfile)
        return read_allocated_hosts(self.scheduler, environ) if self.scheduler is not None else []


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where ranks run and what starts them.

    Attributes:
        launcher: what starts them.
        num_ranks: how many there are; None for all slots of the hosts.
        source: where the list of hosts comes from; without one, they run on this host.
        controller: how ranks on CPUs communicate, `gloo` or `mpi`; None for the launcher's default.
        nic: the network interface to use; None for the one that leads to the other hosts.
        ssh: how other hosts are reached.
        forward_env: variables for the ranks beyond those that always go to them.
        dry_run: print the launcher's command line, and start nothing.
        grace: seconds that ranks may take to save once they were asked to stop.
    """

    launcher: Launcher
    num_ranks: int | None = None
    source: HostSource = HostSource()
    controller: str | None = None
    nic: str | None = None
    ssh: Ssh = DEFAULT_SSH
    forward_env: tuple[str, ...] = ()
    dry_run: bool = False
    grace: float = 30.0

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        """Return the hosts; without a source, those of the launcher's batch system if this is one of its jobs."""
        system = self.launcher.batch_system
        if not self.source.given_options() and system is not None and environ.get(SCHEDULERS.get(system).variable):
            return HostSource(scheduler=system).read_hosts(environ)
        return self.source.read_hosts(environ)


@dataclass(frozen=True, kw_only=True)
class ElasticOptions:
    """How many ranks an elastic run may have, which hosts there are, and how often it is started again.

    Attributes:
        min_np: fewer ranks than these wait for more.
        max_np: there are never more ranks than these; None for any number.
        discovery: a program that prints the current hosts; None for a fixed list (`LaunchOptions.source`).
        relaunches: how often a job that is lost as a whole is started again.
    """

    min_np: int = 1
    max_np: int | None = None
    discovery: Path | None = None
    relaunches: int = 0

    def check_options(self, hosts: Sequence[Host]) -> None:
        """Raise UserError for numbers that contradict each other or `hosts`, or a discovery program that is none.

        Args:
            hosts: the fixed list; ignored if there is a discovery program.
        """
        if self.max_np is not None and self.max_np < self.min_np:
            raise UserError(f"--max-np {self.max_np} is less than --min-np {self.min_np}")
        if self.discovery is None:
            slots = sum(host.slots for host in hosts)
            if slots < self.min_np:
                raise UserError(f"--min-np {self.min_np} is more than the {slots} slots of the hosts given")
        elif not self.discovery.is_file():
            raise UserError(f"--discovery {self.discovery}: there is no such file")
        elif not os.access(self.discovery, os.X_OK):
            raise UserError(f"--discovery {self.discovery} is not executable: chmod +x {self.discovery}")

    @property
    def rank_range_text(self) -> str:
        """`1 to 8` or `1 or more`."""
        return f"{self.min_np} {f'to {self.max_np}' if self.max_np else 'or more'}"
