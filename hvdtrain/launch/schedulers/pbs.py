"""PBS Pro, OpenPBS and Torque: a file that names a host once for each of its slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from hvdtrain.launch.hosts import Host, parse_host
from hvdtrain.launch.scheduler import Scheduler, read_host_lines, register_scheduler, sum_slots
from hvdtrain.system.errors import UserError


@register_scheduler
class Pbs(Scheduler):
    """Slots are a host's lines in PBS_NODEFILE."""

    name: ClassVar[str] = "pbs"
    variable: ClassVar[str] = "PBS_NODEFILE"
    slots_help: ClassVar[str] = "a host's lines in its file"

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        return read_slot_lines(self.variable, environ)


def read_slot_lines(variable: str, environ: Mapping[str, str]) -> list[Host]:
    """Return the hosts of a file that names a host once for each of its slots, as PBS and LSF write it.

    Raises:
        UserError: the file cannot be read, is empty, or a line is not the name of a host.
    """

    def parse_lines() -> Iterator[Host]:
        for where, line in read_host_lines(variable, environ):
            if ":" in line:
                raise UserError(f"{where}: {line!r} is not the name of a host")
            yield Host(parse_host(line, where).name, 1)

    return sum_slots(parse_lines(), f"{variable} {environ[variable]}")
