"""Grid Engine: a file with lines `host slots queue processors`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from hvdtrain.launch.hosts import Host, parse_host
from hvdtrain.launch.scheduler import Scheduler, read_host_lines, register_scheduler, sum_slots
from hvdtrain.system.errors import UserError


@register_scheduler
class GridEngine(Scheduler):
    """Slots are those of PE_HOSTFILE; a host's queues add up."""

    name: ClassVar[str] = "sge"
    variable: ClassVar[str] = "PE_HOSTFILE"
    slots_help: ClassVar[str] = "the slots in its file"

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        return sum_slots(self._parse_lines(environ), f"{self.variable} {environ[self.variable]}")

    def _parse_lines(self, environ: Mapping[str, str]) -> Iterator[Host]:
        for where, line in read_host_lines(self.variable, environ):
            words = line.split()
            if len(words) < 2 or ":" in words[0]:
                raise UserError(f"{where}: {line!r} is not `host slots queue processors`")
            yield parse_host(f"{words[0]}:{words[1]}", where)
